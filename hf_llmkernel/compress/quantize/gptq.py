"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): column by column, each makes up for the rounding of those before it.

Rounding w_ij to q_ij costs row i `(w_ij − q_ij)² / U_jj²` once all its columns after j have moved by
`−(w_ij − q_ij) / U_jj · U_j,·`, with U the upper Cholesky factor of the inverse Hessian. A pruned weight is rounded to
zero whatever it would have become, so that a mask is kept and its columns' rows do not count on it.

Shapes: O out_features, I in_features, B columns of a block. Inside, weights are transposed: a column is one row.
"""

from typing import NamedTuple

import torch

from ...model.configuration_llm_kernel import LinearForm
from ..solve import damped_inverse_cholesky
from ..sparsify.sparsegpt import without_dead_inputs
from .grid import Grid, GridColumns, grid_of

DAMPENING = 0.01
BLOCK = 128


class Rounded(NamedTuple):
    """A weight on a grid, fp32 `[O, I]`, zero where it was pruned; the grid, and the dampening that was used."""

    weight: torch.Tensor
    grid: Grid
    dampening: float


def gptq(
    weight: torch.Tensor,
    gram: torch.Tensor,
    form: LinearForm,
    mask: torch.Tensor | None = None,
    act_order: bool = False,
    static_groups: bool = False,
    scale_search: bool = False,
    dampening: float = DAMPENING,
) -> Rounded:
    """Algorithm 1 of the paper.

    Args:
        weight: `[O, I]`, zero where it is pruned.
        gram: XᵀX, `[I, I]`.
        form: an integer form.
        mask: bool `[O, I]`, true where weights stay; by default all do.
        act_order: columns in descending order of their inputs' energy. Groups are of the columns as they are stored,
            so it takes static ones.
        static_groups: grids of the weights as they were; else of what each group has become when it is reached.
        scale_search: grids that minimize the error that the Hessian charges, instead of those of the whole range.
        dampening: of the Gram matrix, relative to the mean of its diagonal; raised where needed.

    Raises:
        ValueError: what `damped_cholesky` and `grid_of` refuse.
    """
    weight = weight.float()
    gram = without_dead_inputs(weight, gram)[1]
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else None
    upper, used = damped_inverse_cholesky(gram if order is None else gram[order][:, order], dampening)
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    costs = upper.diagonal().float().square().reciprocal()  # of a squared error, all columns after it making up for it
    importance = costs if order is None else torch.empty_like(costs).scatter_(0, order, costs)
    chooser = _GridChooser(form, importance if scale_search else None, kept)
    if order is None and not static_groups:
        rounded, grid = _round_groups_in_turn(weight, upper.float(), kept, chooser)
    else:
        grid = chooser.choose(weight, 0)
        rounded = round_columns(weight, upper.float(), kept, grid, order)
    return Rounded(rounded, grid, used)


class _GridChooser(NamedTuple):
    """How grids are chosen of some columns: their form, `[I]` what their errors cost, and which weights there are."""

    form: LinearForm
    importance: torch.Tensor | None
    kept: torch.Tensor

    def choose(self, weight: torch.Tensor, begin: int) -> Grid:
        """The grid of the columns from `begin` on, whose weights are `[O, columns]`."""
        columns = slice(begin, begin + weight.shape[1])
        kept = self.kept[:, columns]
        importance = None if self.importance is None else self.importance[columns] * kept
        return grid_of(weight * kept, self.form, importance)


def round_columns(
    weight: torch.Tensor, upper: torch.Tensor, kept: torch.Tensor, grid: Grid, order: torch.Tensor | None = None
) -> torch.Tensor:
    """The pass over the columns on a grid that is known: the weight rounded, fp32 `[O, I]`.

    Args:
        weight, upper: fp32 `[O, I]` and U, `[I, I]`, of columns in `order`.
        kept: bool `[O, I]`.
        order: int64 `[I]` of the columns; by default as they are.
    """
    columns, kept = weight.t().clone(memory_format=torch.contiguous_format), kept.t().contiguous()  # [I, O]
    grids = grid.columns(len(columns))
    if order is not None:
        columns, kept, grids = columns[order], kept[order], grids.reordered(order)
    for start in range(0, len(columns), BLOCK):
        _round_block(columns, upper, kept, grids, slice(start, min(start + BLOCK, len(columns))))
    if order is not None:
        columns = torch.empty_like(columns).index_copy_(0, order, columns)
    return columns.t().contiguous()


def _round_groups_in_turn(
    weight: torch.Tensor, upper: torch.Tensor, kept: torch.Tensor, chooser: _GridChooser
) -> tuple[torch.Tensor, Grid]:
    """The pass over the columns, each group's grid chosen when all columns before it have been rounded."""
    columns, kept = weight.t().clone(memory_format=torch.contiguous_format), kept.t().contiguous()  # [I, O]
    group = chooser.form.group_size or len(columns)
    found = []
    for begin in range(0, len(columns), group):
        end = min(begin + group, len(columns))
        grid = chooser.choose(columns[begin:end].t(), begin)
        found.append(grid)
        own = grid.columns(end - begin)
        for start in range(begin, end, BLOCK):
            _round_block(columns, upper, kept, own, slice(start, min(start + BLOCK, end)), begin)
    scales = torch.cat([grid.scales for grid in found], 1)
    zeros = [grid.zero_points for grid in found if grid.zero_points is not None]
    return columns.t().contiguous(), Grid(chooser.form, scales, torch.cat(zeros, 1) if zeros else None)


def _round_block(
    columns: torch.Tensor, upper: torch.Tensor, kept: torch.Tensor, grids: GridColumns, block: slice, begin: int = 0
) -> None:
    """Rounds the columns of a block `[B, O]` in place, and moves all behind them; `grids` begin at column `begin`."""
    own, factor = columns[block], upper[block, block]
    errors = torch.empty_like(own)
    for column in range(len(own)):
        rounded = grids.nearest(block.start - begin + column, own[column]).mul_(kept[block.start + column])
        torch.sub(own[column], rounded, out=errors[column]).div_(factor[column, column])
        own[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
        own[column] = rounded
    columns[block.stop :].addmm_(upper[block, block.stop :].t(), errors, alpha=-1)
