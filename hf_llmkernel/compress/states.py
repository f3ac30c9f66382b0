"""Activations on disk: what runs through the blocks, a few samples at a time in memory.

Shapes: S samples, T tokens a sample, D features.
"""

import os
from pathlib import Path

import torch


class States:
    """Activations `[S, T, D]` in fp32 in a file.

    Args:
        path: of the file; made when it is not there.
        samples, length, width: S, T and D.
    """

    def __init__(self, path: Path, samples: int, length: int, width: int):
        self.path = path
        self.samples, self.length, self.width = samples, length, width
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def read(self, begin: int, end: int) -> torch.Tensor:
        """Samples `begin` to `end` (left out): `[end - begin, T, D]`, a copy."""
        batch = torch.empty(end - begin, self.length, self.width)
        view = batch.numpy().reshape(-1).view("uint8").data
        done = 0
        while done < len(view):
            count = os.preadv(self._handle, [view[done:]], begin * self._sample_bytes + done)
            if not count:
                raise OSError(f"{self.path}: ends before sample {end}; remove the unfinished run and begin again")
            done += count
        return batch

    def write(self, begin: int, values: torch.Tensor) -> None:
        """Puts samples `[n, T, D]` from `begin` on."""
        view = values.detach().cpu().float().contiguous().numpy().reshape(-1).view("uint8").data
        done = 0
        while done < len(view):
            done += os.pwrite(self._handle, view[done:], begin * self._sample_bytes + done)

    def batches(self, size: int) -> list[tuple[int, int]]:
        """`(begin, end)` of batches of at most `size` samples."""
        return [(begin, min(begin + size, self.samples)) for begin in range(0, self.samples, size)]

    def rename(self, path: Path) -> None:
        """Gives the file another name, replacing what has it."""
        os.replace(self.path, path)
        self.path = path

    def close(self, remove: bool = False) -> None:
        """Ends the use of the file; `remove` takes it from the disk."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if remove:
            self.path.unlink(missing_ok=True)

    @property
    def _sample_bytes(self) -> int:
        return self.length * self.width * 4

    def __enter__(self) -> "States":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()
