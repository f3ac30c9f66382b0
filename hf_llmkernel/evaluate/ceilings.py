"""What the machine reaches: bytes read and operations of a matrix product a second, by torch on all threads.

Measured beside everything that is timed: a pace below the best one shows that the machine is held back.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

READ_BYTES = 256 << 20  # more than caches hold
SIDE = 768  # of the square matrices of a product


@dataclass(frozen=True)
class Pace:
    """Bytes read a second, and operations a second of a product in fp32 (a multiplication and an addition are two)."""

    read: float
    product: float

    def share_of(self, best: "Pace") -> float:
        """The smaller of both, as a share of what they were at best."""
        return min(self.read / best.read, self.product / best.product)


def best_pace(paces: Sequence[Pace]) -> Pace:
    """The fastest reading and the fastest product, whichever pace they are of."""
    return Pace(max(pace.read for pace in paces), max(pace.product for pace in paces))


class Calibration:
    """A short fixed piece of work, some 50 ms on two cores, to be timed again and again."""

    def __init__(self) -> None:
        self._stored = torch.ones(READ_BYTES // 4)
        self._square = torch.ones(SIDE, SIDE)

    def pace(self) -> Pace:
        read = _fastest(self._stored.sum, 2)
        product = _fastest(lambda: torch.mm(self._square, self._square), 3)
        return Pace(READ_BYTES / read, _operations(SIDE) / product)


def product_peak(dtype: str, side: int = 1024, repeats: int = 6) -> float:
    """Most operations a second seen in a product of square matrices: of a floating dtype, or `int8` (int32 sums)."""
    square = torch.ones(side, side, dtype=getattr(torch, dtype))
    multiply = torch.ops.aten._int_mm if dtype == "int8" else torch.mm
    multiply(square, square)  # wakes the threads
    return _operations(side) / _fastest(lambda: multiply(square, square), repeats)


def _operations(side: int) -> int:
    return 2 * side**3


def _fastest(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
