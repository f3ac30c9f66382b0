"""Writing a folder of safetensors as a stream: what is held is one piece of one tensor, never a shard.

A shard's header must name every tensor's place, and comes first. So the file starts with room for it, data follows as
it arrives, and the header is filled in at the end, padded with blanks, which the format allows.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

import torch

from .header import ALIGNMENT, NAMES, build_header
from .reader import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 5_000_000_000
HEADER_ROOM = 256 << 10
# Below this the blanks would show in the size of the file: it is copied behind an exact header instead.
COPIED_BELOW = 256 << 20
SPOOL_BYTES = 16 << 20


class CheckpointWriter:
    """Writes `model.safetensors`, or shards and their index, into an existing folder.

    Args:
        folder: to write into; use `output_folder`, so that nothing half-written is ever seen under the final name.
        shard_bytes: most data bytes of one file, unless a single tensor is larger.

    The file names are final after `close`, which leaving a `with` block without an error calls.
    """

    def __init__(self, folder: str | Path, shard_bytes: int = SHARD_BYTES):
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes={shard_bytes}: must be at least 1; the default is {SHARD_BYTES}.")
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self._shards: list[_Shard] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor. Raises `ValueError` for a name that was written already."""
        self.add_blocks(name, tensor.dtype, tuple(tensor.shape), [tensor])

    def add_blocks(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], blocks: Iterable[torch.Tensor]) -> None:
        """Writes one tensor from consecutive pieces of any shape.

        Raises:
            ValueError: a name that was written already, a dtype safetensors does not know, pieces that do not add up.
        """
        if name in self._names:
            raise ValueError(f"{name}: written twice into {self.folder}; give every tensor one name.")
        if dtype not in NAMES:
            raise ValueError(f"{name}: safetensors has no {dtype}; store it as one of {sorted(map(str, NAMES))}.")
        nbytes = math.prod(shape) * dtype.itemsize
        if not self._shards or self._shards[-1].is_full(nbytes, self.shard_bytes):
            self._open_shard()
        self._shards[-1].add(name, dtype, shape, blocks)
        self._names.add(name)
        self.total_bytes += nbytes

    def close(self) -> list[Path]:
        """Gives the shards their final names, writes the index where there are several, and returns the files."""
        if not self._shards:
            self._open_shard()  # a checkpoint without tensors is still one file
        self._shards[-1].finish()
        count = len(self._shards)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        names = names if count > 1 else [SINGLE_FILE]
        for shard, name in zip(self._shards, names, strict=True):
            os.replace(shard.path, self.folder / name)
        if count > 1:
            self._write_index(names)
        return [self.folder / name for name in names]

    def discard(self) -> None:
        """Removes what was written so far."""
        for shard in self._shards:
            shard.discard()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _open_shard(self) -> None:
        if self._shards:
            self._shards[-1].finish()
        self._shards.append(_Shard(self.folder / f"model-{len(self._shards) + 1:05d}.part"))

    def _write_index(self, names: list[str]) -> None:
        weight_map = {key: name for shard, name in zip(self._shards, names, strict=True) for key in shard.tensors}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        with (self.folder / INDEX_FILE).open("w", encoding="utf-8") as file:
            json.dump(index, file, indent=2)
            file.write("\n")
            sync(file)


class _Shard:
    """One file being written.

    Readers look at tensors in place, so each must begin at a multiple of its item size. Those whose bytes are no
    multiple of 8 would shift what follows: they wait in spools, one per item size, and close the file, the largest
    items first.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        self.data_bytes = 0
        self._file = path.open("w+b")
        self._file.seek(HEADER_ROOM)
        self._written = 0
        self._spools: dict[int, tuple[IO[bytes], dict[str, tuple[torch.dtype, tuple[int, ...], int]]]] = {}

    def is_full(self, nbytes: int, shard_bytes: int) -> bool:
        return self.data_bytes > 0 and self.data_bytes + nbytes > shard_bytes

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], blocks: Iterable[torch.Tensor]) -> None:
        expected = math.prod(shape) * dtype.itemsize
        if expected % ALIGNMENT == 0:
            written = _write_blocks(self._file, name, dtype, blocks)
            self.tensors[name] = (dtype, shape, self._written)
            self._written += written
        else:
            spool, waiting = self._spool(dtype.itemsize)
            waiting[name] = (dtype, shape, spool.tell())
            written = _write_blocks(spool, name, dtype, blocks)
        if written != expected:
            raise ValueError(f"{name}: {written} bytes given for {dtype} {list(shape)}, which takes {expected}.")
        self.data_bytes += expected

    def finish(self) -> None:
        """Appends what waits, fills in the header, and makes the bytes reach the disk."""
        for itemsize in sorted(self._spools, reverse=True):
            spool, waiting = self._spools[itemsize]
            for name, (dtype, shape, offset) in waiting.items():
                self.tensors[name] = (dtype, shape, self._written + offset)
            self._written += spool.tell()
            spool.seek(0)
            shutil.copyfileobj(spool, self._file, 1 << 20)
            spool.close()
        header = build_header(self.tensors, {"format": "pt"})
        if len(header) > HEADER_ROOM or self.data_bytes < COPIED_BELOW:
            self._copy_behind(header)
        else:
            blanks = HEADER_ROOM - len(header)
            self._file.seek(0)
            self._file.write((len(header) - 8 + blanks).to_bytes(8, "little") + header[8:] + b" " * blanks)
        sync(self._file)
        self._file.close()

    def _copy_behind(self, header: bytes) -> None:
        exact = self.path.with_suffix(".copy").open("w+b")
        try:
            exact.write(header)
            self._file.seek(HEADER_ROOM)
            shutil.copyfileobj(self._file, exact, 1 << 20)
        except BaseException:
            exact.close()
            os.unlink(exact.name)
            raise
        self._file.close()
        self._file = exact
        os.replace(exact.name, self.path)

    def discard(self) -> None:
        for file in (self._file, *(spool for spool, _ in self._spools.values())):
            with suppress(OSError):  # its buffer no longer fits on the disk, and it is about to be removed
                file.close()
        self.path.unlink(missing_ok=True)

    def _spool(self, itemsize: int):
        if itemsize not in self._spools:
            spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES, dir=str(self.path.parent))  # noqa: SIM115
            self._spools[itemsize] = (cast(IO[bytes], spool), {})
        return self._spools[itemsize]


def _write_blocks(file: IO[bytes], name: str, dtype: torch.dtype, blocks: Iterable[torch.Tensor]) -> int:
    written = 0
    for block in blocks:
        if block.dtype != dtype:
            raise ValueError(f"{name}: a piece of {block.dtype} in a tensor of {dtype}; cast it first.")
        flat = block.detach().cpu().contiguous().view(-1)
        written += file.write(flat.view(torch.uint8).numpy().data)
    return written


def sync(file: IO) -> None:
    """Makes what was written reach the disk, so that a rename after it never shows less."""
    file.flush()
    os.fsync(file.fileno())
