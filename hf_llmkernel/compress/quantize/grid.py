"""Grids: the values that a group's integers can stand for, `(code − zero) · scale`, and how they are chosen.

Shapes: O out_features, I in_features, G groups of columns.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ...model.configuration_llm_kernel import LinearForm
from ...model.linear_llm_kernel import dequantize, expand_groups, quantize, round_to_nearest

SHRINKS = tuple(1 - 0.04 * step for step in range(16))  # of a group's range, from all of it to 0.4


class Grid(NamedTuple):
    """Scales and zero points (`None` where symmetric) `[O, G]` of a form, in the dtypes they are stored in."""

    form: LinearForm
    scales: torch.Tensor
    zero_points: torch.Tensor | None

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The values on the grid nearest to a weight: fp32 `[O, I]`."""
        codes = quantize(weight, self.form, self.scales, self.zero_points)
        return dequantize(codes, self.form, self.scales, self.zero_points)

    def columns(self, in_features: int) -> "GridColumns":
        """The grid of every single column."""
        scales = expand_groups(self.scales, in_features, self.form.group_size).t().contiguous()
        if self.zero_points is None:
            return GridColumns(scales, torch.zeros_like(scales), *code_range(self.form))
        zeros = expand_groups(self.zero_points, in_features, self.form.group_size).t().contiguous()
        return GridColumns(scales, zeros, *code_range(self.form))


class GridColumns(NamedTuple):
    """Scales and zeros fp32 `[I, O]`, one row a column of the weight, and the smallest and largest code."""

    scales: torch.Tensor
    zeros: torch.Tensor
    low: int
    high: int

    def nearest(self, column: int, values: torch.Tensor) -> torch.Tensor:
        """The values `[O]` on the grid of a column that are nearest to some."""
        scale, zero = self.scales[column], self.zeros[column]
        codes = (values / torch.where(scale == 0, 1, scale)).add_(zero).round_().clamp_(self.low, self.high)
        return codes.sub_(zero).mul_(scale)

    def reordered(self, order: torch.Tensor) -> "GridColumns":
        """The grid of columns in another order, int64 `[I]`."""
        return self._replace(scales=self.scales[order], zeros=self.zeros[order])


def code_range(form: LinearForm) -> tuple[int, int]:
    """The smallest and the largest code; of a symmetric form around zero."""
    if not form.symmetric:
        return 0, 2**form.bits - 1
    return (-8, 7) if form.bits == 4 else (-127, 127)


def grid_of(weight: torch.Tensor, form: LinearForm, importance: torch.Tensor | None = None) -> Grid:
    """A grid for a weight.

    Args:
        weight: `[O, I]`.
        form: an integer form.
        importance: of the weights' squared errors, `[I]` or `[O, I]`: of several parts of each group's range, and in a
            symmetric 4-bit form either sign of the scale (its codes reach from −8 to 7), the one with the least sum is
            taken. By default the whole range is.

    Raises:
        ValueError: a range that the scale's dtype cannot hold.
    """
    if importance is None:
        return Grid(form, *round_to_nearest(weight, form))
    best, least = None, None
    for grid in _candidates(weight.float(), form):
        errors = group_sums((weight - grid.nearest(weight)).square_().mul_(importance), form.group_size)
        if best is None or least is None:
            best, least = grid, errors
            continue
        better = errors < least
        least = torch.where(better, errors, least)
        best = chosen(better, grid, best)
    assert best is not None
    return best


def _candidates(weight: torch.Tensor, form: LinearForm) -> Iterator[Grid]:
    for shrink in SHRINKS:
        grid = Grid(form, *round_to_nearest(weight * shrink, form))
        yield grid
        if form.symmetric and form.bits == 4:
            yield grid._replace(scales=-grid.scales)


def underflowed(weight: torch.Tensor, rounded: torch.Tensor, grid: Grid) -> int:
    """How many values of a weight `[O, I]` are zero once rounded, as the scales' dtype has no number small enough."""
    limits = torch.finfo(grid.scales.dtype)
    least = grid.scales.abs() <= limits.smallest_normal * limits.eps
    there = expand_groups(least, weight.shape[1], grid.form.group_size) > 0
    return int(((weight != 0) & (rounded == 0) & there).sum())


def chosen(where: torch.Tensor, grid: Grid, other: Grid) -> Grid:
    """One grid where bool `[O, G]`, or `[O, 1]`, is true, and another elsewhere."""
    scales = torch.where(where, grid.scales, other.scales)
    if grid.zero_points is None or other.zero_points is None:
        return Grid(grid.form, scales, None)
    return Grid(grid.form, scales, torch.where(where, grid.zero_points, other.zero_points))


def group_sums(values: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """Sums over the groups of columns: `[..., G]` of `[..., I]`."""
    group = min(group_size or values.shape[-1], values.shape[-1])
    return F.pad(values, (0, -values.shape[-1] % group)).unflatten(-1, (-1, group)).sum(-1)
