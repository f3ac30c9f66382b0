"""Reading a GGUF file: its metadata, and its tensors dequantized piece by piece under Llama's names.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package turns blocks into numbers; its own
reader is not used, for it builds a Python object per token and maps the whole file into memory.
"""

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.header import read_bytes
from ..checkpoint.reader import BLOCK_BYTES, check_finite

# Metadata value types of fixed size, as `struct` formats; 8 is a string and 9 an array.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32
F32 = 0

TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Linears whose rows the `llama` architecture interleaves.
ROTATED = ("q_proj", "k_proj")


@dataclass(frozen=True)
class PackedTensor:
    """Where one tensor lies: rows of `row_bytes` bytes, `columns` values each, in blocks of ggml type `kind`."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


class GGUFFile:
    """A GGUF file: `metadata`, and what `CheckpointReader` offers, under Hugging Face names and in fp32.

    Args:
        path: the file.

    Raises:
        ValueError: not a GGUF file, or cut short; the package `gguf` is not installed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.metadata, tensors = _Parser(data).parse()
        except (struct.error, ValueError, OverflowError, KeyError) as error:
            reason = str(error) if isinstance(error, ValueError) else "its header is cut short or damaged"
            raise ValueError(f"{self.path}: is not a readable GGUF file ({reason}); fetch it again.") from None
        if (parts := self.metadata.get("split.count", 1)) > 1:
            raise ValueError(f"{self.path}: is one of {parts} parts; join them with llama-gguf-split --merge.")
        size = self.path.stat().st_size
        for tensor in tensors:
            if tensor.offset + tensor.nbytes > size:
                raise ValueError(f"{self.path}: truncated, {tensor.name} ends beyond byte {size}; fetch it again.")
        self.packed = {hugging_face_name(tensor.name): tensor for tensor in tensors}
        if len(self.packed) < len(tensors):
            raise ValueError(f"{self.path}: names a tensor twice; fetch it again.")
        self._heads: dict[str, list[int]] = {}

    def undo_permutation(self, num_attention_heads: list[int], num_key_value_heads: list[int]) -> None:
        """From now on gives queries and keys with the rows of Llama: files of `llama` and `deci` interleave the two
        halves that a rotation turns into each other, head by head; given are the heads of every layer."""
        self._heads = {"attn_q": num_attention_heads, "attn_k": num_key_value_heads}

    def keys(self) -> list[str]:
        return list(self.packed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.packed[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32

    def file(self, key: str) -> Path:
        return self.path

    def blocks(self, key: str) -> Iterator[torch.Tensor]:
        """A tensor's values as fp32 `[n, columns]`, a few rows at a time. Raises `ValueError` where not finite."""
        for packed in self.packed_rows(key):
            values = dequantize_rows(packed, self.packed[key].kind)
            check_finite(key, values, self.path)
            yield values

    def packed_rows(self, key: str) -> Iterator[torch.Tensor]:
        """A tensor's rows as they are packed, uint8 `[n, row_bytes]`, a few at a time."""
        tensor = self.packed[key]
        rotated = re.match(r"blk\.(\d+)\.(attn_[qk])\.", tensor.name) if self._heads else None
        return self._rows(tensor, self._heads[rotated[2]][int(rotated[1])] if rotated else None)

    def type_name(self, key: str) -> str:
        """The name of a tensor's ggml type, such as `Q6_K`."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.packed[key].kind).name

    def values(self, key: str) -> torch.Tensor:
        """A whole tensor, fp32."""
        return torch.cat(list(self.blocks(key))).view(self.shape(key))

    def _rows(self, tensor: PackedTensor, heads: int | None) -> Iterator[torch.Tensor]:
        """Bytes `[n, row_bytes]` in order; a permuted tensor is read at once, for its bytes are few while packed."""
        step = max(1, BLOCK_BYTES // (tensor.shape[-1] * 4))
        if heads is not None:
            packed = read_bytes(self.path, tensor.offset, tensor.nbytes)
            yield from _restore_rows(packed, heads, tensor).split(step)
            return
        for row in range(0, tensor.rows, step):
            count = min(step, tensor.rows - row)
            packed = read_bytes(self.path, tensor.offset + row * tensor.row_bytes, count * tensor.row_bytes)
            yield packed.view(count, tensor.row_bytes)


def _restore_rows(packed: torch.Tensor, heads: int, tensor: PackedTensor) -> torch.Tensor:
    """Rows `[heads, pairs, 2]` of a file become rows `[heads, 2, pairs]`; of a bias, its single values do."""
    rows = tensor.shape[0]
    pairs = packed.view(heads, rows // heads // 2, 2, -1).transpose(1, 2)
    return pairs.reshape(tensor.rows, tensor.row_bytes)


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys, or values of their bias, as the `llama` architecture stores them: of every head, those
    of its two halves by turns."""
    pairs = rows.view(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def dequantize_rows(packed: torch.Tensor, kind: int) -> torch.Tensor:
    """fp32 `[n, columns]` of rows of ggml blocks, uint8 `[n, row_bytes]`."""
    from gguf import GGMLQuantizationType, dequantize

    return torch.from_numpy(dequantize(packed.numpy(), GGMLQuantizationType(kind)))


def hugging_face_name(name: str) -> str:
    """Llama's name of a GGUF tensor; a name that has none stays as it is, and is found unexpected later."""
    stem, _, suffix = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        leaf = LAYER_NAMES.get(match[2])
        return f"model.layers.{match[1]}.{leaf}.{suffix}" if leaf else name
    return f"{TOP_NAMES[stem]}.{suffix}" if stem in TOP_NAMES else name


class _Parser:
    """A cursor over the head of a file."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.position = 0

    def parse(self) -> tuple[dict[str, Any], list[PackedTensor]]:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("I")) not in (2, 3):
            raise ValueError(f"its version {version} is not 2 or 3")
        tensor_count, pair_count = self._number("Q"), self._number("Q")
        metadata = {}
        for _ in range(pair_count):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        entries = [self._entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        start = -(-self.position // alignment) * alignment
        return metadata, [_packed(*entry[:3], start + entry[3]) for entry in entries]

    def _take(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise ValueError("it ends in its header")
        self.position += count
        return taken

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        return self._take(self._number("Q")).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._number(NUMBERS[kind])
        kind, count = self._number("I"), self._number("Q")
        if kind in NUMBERS:
            code = NUMBERS[kind]
            return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(f"<{code}"))))
        return [self._value(kind) for _ in range(count)]

    def _entry(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        dims = struct.unpack(f"<{(count := self._number('I'))}Q", self._take(8 * count))
        kind, offset = self._number("I"), self._number("Q")
        return name, kind, tuple(reversed(dims)), offset  # ggml counts the fastest dimension first


def _packed(name: str, kind: int, shape: tuple[int, ...], offset: int) -> PackedTensor:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise ValueError("reading it needs the package gguf: pip install gguf") from None
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not shape or shape[-1] % block:
        raise ValueError(f"{name} of shape {list(shape)} is not whole blocks of {block}")
    return PackedTensor(name, kind, shape, offset, shape[-1] // block * block_bytes)
