"""Text from a model that is larger than the memory it may take: its blocks are read while others compute.

The first blocks stay, as many as there is room for. The others come from the files at every step, through two buffers
of a block's size each: a thread fills one while the block in the other computes. Files are read past the page cache
where the file system can (`O_DIRECT`), for no page would live until its next use.

Reading order: `load_paged` -> what fits -> the pages -> one block -> reading.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import nn
from transformers import GenerationConfig

from ..checkpoint.header import StoredTensor
from ..checkpoint.model_folder import ModelFolder
from ..evaluate.table import size
from ..model.modeling_llm_kernel import LLMKernelForCausalLM, LLMKernelRotaryEmbedding

ALIGNMENT = 4096  # of addresses, offsets and lengths that go past the page cache
CHUNK_BYTES = 16 << 20
LEAST_UNIT = 10**7  # in which the least memory is told: what the interpreter takes is another every time
RESERVE_BYTES = 96 << 20  # activations, keys and values, and what a product needs


def load_paged(folder: str | Path, memory_bytes: int) -> LLMKernelForCausalLM:
    """A causal model in evaluation whose process is to take no more memory than this, for `generate` and `forward`.

    Everything is computed by torch in the checkpoint's own dtype. `model.pages` tells what was read, and how fast.

    Args:
        folder: a checkpoint of this family.
        memory_bytes: of the whole process, the interpreter and its libraries too.

    Raises:
        ValueError: a damaged checkpoint, one without a head, or too little memory for two blocks beside what must be
            there all the time.
    """
    source = ModelFolder(Path(folder).expanduser())
    if not source.has_head or source.quantization is not None:
        what = "no language-model head" if not source.has_head else "linears of bitsandbytes"
        raise ValueError(f"{folder}: has {what}; paging generates from this family's own causal checkpoints.")
    model = _on_meta(source)
    blocks = [_stored_block(source, model, index) for index in range(source.config.num_hidden_layers)]
    pinned = pinned_blocks([block.nbytes for block in blocks], _top_bytes(source), memory_bytes)
    _load_top(source, model)
    vars(model)["pages"] = Pages(list(model.model.layers), blocks, pinned)
    return model


def _on_meta(source: ModelFolder) -> LLMKernelForCausalLM:
    """The model without weights."""
    source.config.architectures = [LLMKernelForCausalLM.__name__]
    with torch.device("meta"):
        model = LLMKernelForCausalLM(source.config).eval().requires_grad_(False)
    nn.Module.to(model, source.dtype)
    model.model.rotary_emb = LLMKernelRotaryEmbedding(source.config)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model


def _load_top(source: ModelFolder, model: LLMKernelForCausalLM) -> None:
    """Embedding, last norm and head."""
    tensors = {name: source.reader.tensor(name) for name in source.others if not _is_tied(source, name)}
    if unexpected := model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys:
        raise ValueError(f"{unexpected[0]}: is not of the configuration; config.json and weights must be of one model.")
    model.tie_weights()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and not name.startswith("model.layers."):
            raise ValueError(f"{name}: missing in {source.folder}; fetch or write the checkpoint again.")


def _is_tied(source: ModelFolder, name: str) -> bool:
    return bool(source.config.tie_word_embeddings) and name.startswith("lm_head.")


def _top_bytes(source: ModelFolder) -> int:
    return sum(source.reader.stored(name).nbytes for name in source.others if not _is_tied(source, name))


# What fits


def pinned_blocks(block_bytes: list[int], top_bytes: int, memory_bytes: int) -> int:
    """How many of the first blocks stay in memory.

    Raises:
        ValueError: not even two blocks fit beside the interpreter and what is outside of the blocks.
    """
    free = memory_bytes - psutil.Process().memory_info().rss - top_bytes - RESERVE_BYTES
    if sum(block_bytes) <= free:
        return len(block_bytes)
    free -= 2 * (max(block_bytes) + 2 * ALIGNMENT)
    if free < 0:
        least = -(-(memory_bytes - free) // LEAST_UNIT) * LEAST_UNIT
        raise ValueError(
            f"memory={size(memory_bytes)}: the interpreter with what it has loaded, the embedding and two blocks need "
            f"{least // 10**6}MB; allow that, or compress the checkpoint."
        )
    pinned = 0
    while sum(block_bytes[: pinned + 1]) <= free:
        pinned += 1
    return pinned


# The pages


class Pages:
    """Blocks of a model that come from files.

    Args:
        layers: the modules of the blocks, on the meta device.
        blocks: where the tensors of each lie.
        pinned: how many of the first ones are read now and stay.
    """

    def __init__(self, layers: list[nn.Module], blocks: "list[StoredBlock]", pinned: int):
        self.layers, self.blocks, self.pinned = layers, blocks, pinned
        self.bytes_read, self.seconds_reading, self.seconds_waiting = 0, 0.0, 0.0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pages")
        self._slot = 0  # of the buffer that computes
        self._ahead: tuple[int, Future[dict[str, torch.Tensor]]] | None = None
        for layer, block in zip(layers[:pinned], blocks[:pinned], strict=True):
            _bind(layer, block.read(aligned_buffer(block.buffer_bytes)))
        if pinned < len(layers):
            largest = max(block.buffer_bytes for block in blocks[pinned:])
            self._buffers = [aligned_buffer(largest) for _ in range(2)]
        for index in range(pinned, len(layers)):
            for module in layers[index].modules():
                vars(module)["_paging"] = True  # nothing derived from its tensors is kept
            layers[index].register_forward_pre_hook(partial(self._enter, index))
            layers[index].register_forward_hook(partial(self._leave, index))

    def _enter(self, index: int, *_: Any) -> None:
        """Waits for a block, and has the next one read."""
        if self._ahead is None or self._ahead[0] != index:
            self._read_ahead(index)
        started = time.perf_counter()
        assert self._ahead is not None
        tensors = self._ahead[1].result()
        self.seconds_waiting += time.perf_counter() - started
        self._slot = 1 - self._slot
        _bind(self.layers[index], tensors)
        self._read_ahead(index + 1 if index + 1 < len(self.layers) else self.pinned)

    def _read_ahead(self, index: int) -> None:
        """Fills the buffer that does not compute."""
        if self._ahead is not None:
            self._ahead[1].exception()  # waits: a block that nobody asked for was on its way
        self._ahead = (index, self._reader.submit(self._read, self.blocks[index], self._buffers[1 - self._slot]))

    def _read(self, block: "StoredBlock", buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        tensors = block.read(buffer)
        self.seconds_reading += time.perf_counter() - started
        self.bytes_read += block.nbytes
        return tensors

    def _leave(self, index: int, *_: Any) -> None:
        """A block's weights are gone when it has computed: their buffer is filled anew."""
        _bind(self.layers[index], {})


def _bind(layer: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Gives a layer its tensors, or none: then what it had is on the meta device."""
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        for name, own in module._parameters.items():
            if own is not None:
                found = tensors.get(prefix + name, own.data.to("meta"))
                module._parameters[name] = nn.Parameter(found, requires_grad=False)
        for name, own in module._buffers.items():
            if own is not None:
                module._buffers[name] = tensors.get(prefix + name, own.to("meta"))


# One block


@dataclass(frozen=True)
class Extent:
    """Bytes of a file that are read at once: `offset` and `length` are aligned, `needed` of them are of tensors."""

    path: Path
    offset: int
    length: int
    needed: int
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class StoredBlock:
    """Where a block's tensors lie."""

    extents: list[Extent]

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for extent in self.extents for stored in extent.tensors.values())

    @property
    def buffer_bytes(self) -> int:
        return sum(extent.length for extent in self.extents)

    def read(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """All tensors by their names in the block, views of an aligned buffer, uint8 of `buffer_bytes` at least."""
        tensors, begin = {}, 0
        for extent in self.extents:
            part = buffer[begin : begin + extent.length]
            read_extent(extent, part)
            for name, stored in extent.tensors.items():
                start = stored.offset - extent.offset
                tensors[name] = _viewed(part[start : start + stored.nbytes], stored)
            begin += extent.length
        return tensors


def _viewed(stored_bytes: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    if stored_bytes.data_ptr() % stored.dtype.itemsize:
        stored_bytes = stored_bytes.clone()
    return stored_bytes.view(stored.dtype).view(stored.shape)


def _stored_block(source: ModelFolder, model: LLMKernelForCausalLM, index: int) -> StoredBlock:
    """Where a block's tensors lie. Raises `ValueError` where they are not those of the configuration."""
    stored = source.stored_block(index)
    expected = model.model.layers[index].state_dict()
    for name in sorted(expected.keys() ^ stored.keys()):
        fault = "missing" if name in expected else "not of the configuration"
        raise ValueError(f"model.layers.{index}.{name}: {fault}; config.json and weights must be of one checkpoint.")
    for name, entry in stored.items():
        if entry.shape != tuple(expected[name].shape):
            raise ValueError(
                f"model.layers.{index}.{name}: has shape {list(entry.shape)}, config.json says "
                f"{list(expected[name].shape)}; they must be of one checkpoint."
            )
    return StoredBlock(list(_extents(stored)))


def _extents(stored: dict[str, StoredTensor]) -> Iterator[Extent]:
    """Tensors that lie within a chunk of each other are read together."""
    names = sorted(stored, key=lambda name: (str(stored[name].path), stored[name].offset))
    groups: list[list[str]] = []
    for name in names:
        last = stored[groups[-1][-1]] if groups else None
        gap = stored[name].offset - (last.offset + last.nbytes) if last and last.path == stored[name].path else None
        if gap is None or gap > ALIGNMENT:
            groups.append([])
        groups[-1].append(name)
    for group in groups:
        first, last = stored[group[0]], stored[group[-1]]
        offset = first.offset // ALIGNMENT * ALIGNMENT
        needed = last.offset + last.nbytes - offset
        length = -(-needed // ALIGNMENT) * ALIGNMENT
        yield Extent(first.path, offset, length, needed, {name: stored[name] for name in group})


# Reading


def aligned_buffer(nbytes: int) -> torch.Tensor:
    """Uninitialized uint8 `[nbytes]` that begins at an aligned address."""
    space = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
    begin = -space.data_ptr() % ALIGNMENT
    return space[begin : begin + nbytes]


def read_extent(extent: Extent, buffer: torch.Tensor) -> None:
    """Fills a buffer `[length]` from a file.

    Raises:
        OSError: the file ends before, or cannot be read.
    """
    target = memoryview(cast(Any, buffer.numpy()))
    file = _open(extent.path)
    try:
        done = 0
        while done < extent.needed:
            count = os.preadv(file, [target[done : done + CHUNK_BYTES]], extent.offset + done)
            if count == 0:
                raise OSError(f"{extent.path}: ends at byte {extent.offset + done}; fetch or write it again.")
            done += count
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, extent.offset, extent.length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # a file system that always caches
        return os.open(path, os.O_RDONLY)
