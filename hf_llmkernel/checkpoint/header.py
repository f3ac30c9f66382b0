"""The header of a safetensors file: 8 bytes of length, a JSON table of tensors, then their bytes without a gap.

Layout: https://github.com/huggingface/safetensors#format. It is parsed here because the library maps files into memory,
where every page that was read counts as the process's own; a walk over a large checkpoint must not add up to all of it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000  # the library's own limit
ALIGNMENT = 8
POINTER_START = b"version "

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `nbytes` bytes from `offset` (of the file) in `path`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def build_header(tensors: "dict[str, tuple[torch.dtype, tuple[int, ...], int]]", metadata: dict[str, str]) -> bytes:
    """The length and JSON of a file whose tensors are `{name: (dtype, shape, offset in the data)}`, padded to 8."""
    table: dict[str, Any] = {"__metadata__": metadata}
    for name, (dtype, shape, offset) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, every one of which lies inside it.

    Raises:
        ValueError: the file is cut short, is not a safetensors file, or its header contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        if start == POINTER_START:
            raise ValueError(f"{path}: is a pointer of Git LFS and not the file itself; fetch it by `git lfs pull`.")
        length = int.from_bytes(start, "little")
        if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, LARGEST_HEADER):
            raise ValueError(f"{path}: {size} bytes are no safetensors file, or its start; fetch this file again.")
        table = _parse_table(path, file.read(length))
    start = LENGTH_BYTES + length
    tensors = {name: _read_entry(path, name, entry, start) for name, entry in table.items()}
    _check_layout(path, tensors, start, size)
    return tensors


def _parse_table(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if doubled := [name for name in set(names) if names.count(name) > 1]:
            raise ValueError(f"names {sorted(doubled)[0]} twice")
        return dict(pairs)

    try:
        table = json.loads(text, object_pairs_hook=unique)
        if not isinstance(table, dict):
            raise ValueError("is not a table of tensors")
    except ValueError as error:  # of JSON and of UTF-8 alike
        raise ValueError(f"{path}: damaged header, it {_reason(error)}; fetch this file again.") from None
    table.pop("__metadata__", None)
    return table


def _reason(error: ValueError) -> str:
    is_format = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
    return "is not JSON" if is_format else str(error)


def _read_entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        well_formed = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        dtype, shape, begin, end, well_formed = None, (), 0, 0, False
    if not well_formed:
        raise ValueError(f"{path}: damaged header at {name}; fetch this file again.")
    if dtype not in DTYPES:
        raise ValueError(f"{path}: {name} has dtype {dtype!r}, which is not one of {sorted(DTYPES)}; convert it first.")
    tensor = StoredTensor(path, DTYPES[dtype], shape, start + begin)
    if tensor.nbytes != end - begin:
        raise ValueError(
            f"{path}: damaged header, {name} of {dtype} {list(shape)} takes {tensor.nbytes} bytes and not "
            f"{end - begin}; fetch this file again."
        )
    return tensor


def _check_layout(path: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            raise ValueError(f"{path}: damaged header, {name} leaves a gap or overlaps; fetch it again.")
        position += tensor.nbytes
    if size < position:
        raise ValueError(f"{path}: truncated, {size} bytes of {position}; fetch this file again.")
    if size > position:
        raise ValueError(f"{path}: {size - position} bytes beyond its last tensor; fetch this file again.")


def read_bytes(path: Path, offset: int, count: int) -> torch.Tensor:
    """`count` bytes from `offset` in a buffer of their own: uint8 `[count]`.

    Raises:
        ValueError: the file ends before.
    """
    buffer = torch.empty(count, dtype=torch.uint8)
    view = buffer.numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < count:
            read = file.readinto(view[done:])
            if not read:
                raise ValueError(f"{path}: truncated, it ends before byte {offset + count}; fetch this file again.")
            done += read
    return buffer
