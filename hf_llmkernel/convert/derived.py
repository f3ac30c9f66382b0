"""Tensors that are computed when they are read: what a packed format holds under the names of another one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Derived:
    """One tensor: its shape and dtype, the file it comes from, and what reads its pieces."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], Iterator[torch.Tensor]]


class DerivedTensors:
    """What a conversion reads from (`names.Tensors`), entry by entry.

    Args:
        entries: `{key: tensor}`, in the order in which they are to be written.
    """

    def __init__(self, entries: dict[str, Derived]):
        self._entries = entries

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[key].dtype

    def file(self, key: str) -> Path:
        return self._entries[key].file

    def blocks(self, key: str) -> Iterator[torch.Tensor]:
        return self._entries[key].read()


def one(read: Callable[[], torch.Tensor]) -> Iterator[torch.Tensor]:
    """A tensor that is read whole, as its pieces."""
    yield read()
