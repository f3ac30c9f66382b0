"""How many groups stay, and which: for one module by its ratio, for many by one threshold.

Shapes: N groups (neurons or heads) of a module, M modules, C candidate thresholds.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


def pruned_width(width: int, ratio: float, align: int) -> int:
    """The multiple of `align` nearest to `width * (1 - ratio)`, the smaller one of two.

    Raises:
        ValueError: a width that would be none, or not below the present one.
    """
    target = width * (1 - ratio)
    kept = math.ceil(target / align - 0.5) * align
    if not 0 < kept < width:
        raise ValueError(
            f"ratio={ratio}: of {width} leaves {target:g}, nearest multiple of align={align} {kept}; "
            "change ratio or lower align."
        )
    return kept


def select(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` highest scores `[N]`, the first of equals; ascending int64 `[count]`."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def allocate_widths(
    scores: Sequence[torch.Tensor],
    ratio: float,
    align: int | Sequence[int] = 64,
    minimum: int | Sequence[int] = 1,
    parameters: Sequence[int] | None = None,
) -> list[int]:
    """Kept widths of many modules: each keeps its groups above one threshold, to the nearest multiple of its `align`.

    The threshold is the one whose total of parameters comes nearest to `ratio`, the smaller total of two (FLAP's
    search, arXiv 2312.11983). A module that keeps everything need not be a multiple.

    Args:
        scores: M of `[N]`, comparable between modules, as `flap.standardize` makes them.
        ratio: share of all these groups' parameters to remove.
        align: of every module, or one a module, such as 1 for heads and 64 for neurons.
        minimum: groups that a module keeps at least, rounded up to its `align`; likewise.
        parameters: of one group of each module; by default all are alike.

    Returns:
        M widths.

    Raises:
        ValueError: a ratio that the minimum does not allow, or so small that nothing would be removed.
    """
    modules = _modules(scores, align, minimum, parameters)
    total = sum(len(module.scores) * module.parameters for module in modules)
    least = sum(module.floor * module.parameters for module in modules)
    target = total * (1 - ratio)
    if least > target:
        raise ValueError(
            f"ratio={ratio}: leaves {target:g} of {total} parameters, but minimum={minimum} and align={align} hold "
            f"{least}; lower one of the three."
        )
    thresholds = torch.cat([*scores, scores[0].new_full((1,), math.inf)]).unique()  # [C], ascending
    totals = torch.zeros_like(thresholds, dtype=torch.int64)
    for module in modules:
        totals += module.widths(thresholds) * module.parameters
    distances = (totals - target).abs()
    nearest = thresholds[distances == distances.min()][-1:]  # the last, for totals fall as thresholds rise
    kept = [int(module.widths(nearest)) for module in modules]
    if kept == [len(module.scores) for module in modules]:
        raise ValueError(f"ratio={ratio}: too small to remove anything at align={align}; raise it or lower align.")
    return kept


class _Module(NamedTuple):
    """Scores `[N]`, the multiple its width is rounded to, the smallest width, and the parameters of one group."""

    scores: torch.Tensor
    align: int
    floor: int
    parameters: int

    def widths(self, thresholds: torch.Tensor) -> torch.Tensor:
        """How many groups stay at each threshold, int64 `[C]`."""
        width = len(self.scores)
        reach = width - torch.searchsorted(self.scores.sort().values, thresholds)  # scores at or above it
        nearest = (2 * reach + self.align - 1) // (2 * self.align) * self.align  # the smaller of two
        return torch.where(reach == width, width, nearest.clamp(self.floor, width))


def _modules(
    scores: Sequence[torch.Tensor],
    align: int | Sequence[int],
    minimum: int | Sequence[int],
    parameters: Sequence[int] | None,
) -> list[_Module]:
    aligns, minimums, costs = (
        [number] * len(scores) if isinstance(number, int) else number for number in (align, minimum, parameters or 1)
    )
    return [
        _Module(module, step, min(math.ceil(least / step) * step, len(module)), cost)
        for module, step, least, cost in zip(scores, aligns, minimums, costs, strict=True)
    ]
