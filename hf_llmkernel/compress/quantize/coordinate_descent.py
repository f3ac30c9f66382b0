"""Coordinate descent on integers (QuantEase, Behdin et al. 2023, arXiv 2309.01885), grids refitted in between.

GPTQ decides on each column once. Here columns are visited again: with all others as they are, the best value of column
j is `q_j + ((W − Q) H)_j / H_jj`, rounded to the grid. For codes as they are, scales and zero points are a least
squares problem of every row, all its groups together. Both only lower `tr((W − Q) H (W − Q)ᵀ)`, from GPTQ's result on.

Shapes: O out_features, I in_features, G groups of columns, B columns of a block, P parameters of a row's grid. Inside
of `descend`, weights are transposed: a column is one row.
"""

import torch

from ...model.configuration_llm_kernel import LinearForm
from ...model.linear_llm_kernel import expand_groups
from ..sparsify.sparsegpt import without_dead_inputs
from .gptq import BLOCK, DAMPENING, Rounded, gptq
from .grid import Grid, GridColumns, chosen, group_sums

ROUNDS = 3
PASSES = 2
RIDGE = 1e-6


def coordinate_descent(
    weight: torch.Tensor,
    gram: torch.Tensor,
    form: LinearForm,
    mask: torch.Tensor | None = None,
    dampening: float = DAMPENING,
    rounds: int = ROUNDS,
    passes: int = PASSES,
) -> Rounded:
    """GPTQ with searched scales and columns in the order of their energy; then grids and codes in turn.

    Args:
        weight, gram, form, mask, dampening: as `gptq`.
        rounds: each refits the grid and then makes passes over the columns.
        passes: over the columns, in each round.
    """
    weight = weight.float()
    start = gptq(weight, gram, form, mask, act_order=True, scale_search=True, dampening=dampening)
    hessian = without_dead_inputs(weight, gram)[1]
    hessian.diagonal().add_(start.dampening * hessian.diagonal().mean())
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    rounded, grid = start.weight, start.grid
    for _ in range(rounds):
        rounded, grid = refit_grid(weight, rounded, grid, hessian, kept)
        for _ in range(passes):
            rounded = descend(weight, rounded, grid, hessian, kept)
    return Rounded(rounded, grid, start.dampening)


def descend(
    weight: torch.Tensor, rounded: torch.Tensor, grid: Grid, hessian: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """One pass over the columns (QuantEase, algorithm 2): each becomes the best that the grid has for it.

    Args:
        weight, rounded: W and Q, fp32 `[O, I]`.
        grid: that Q lies on.
        hessian: H, fp32 `[I, I]`, with a diagonal above zero.
        kept: bool `[O, I]`; Q stays zero elsewhere.
    """
    columns, stays = rounded.t().clone(memory_format=torch.contiguous_format), kept.t().contiguous()  # [I, O]
    grids = grid.columns(len(columns))
    missing = hessian @ (weight.t() - columns)  # [I, O], half of the gradient with its sign turned
    for start in range(0, len(columns), BLOCK):
        block = slice(start, min(start + BLOCK, len(columns)))
        moves = _descend_block(columns, missing[block].clone(), hessian[block, block], stays, grids, start)
        missing.addmm_(hessian[:, block], moves, alpha=-1)
    return columns.t().contiguous()


def _descend_block(
    columns: torch.Tensor,
    missing: torch.Tensor,
    hessian: torch.Tensor,
    kept: torch.Tensor,
    grids: GridColumns,
    start: int,
) -> torch.Tensor:
    """Moves the columns from `start` on that a block `[B, B]` of the Hessian is of; returns by how much, `[B, O]`."""
    moves = torch.empty_like(missing)
    for column, curvature in enumerate(hessian.diagonal().tolist()):
        own = columns[start + column]
        best = grids.nearest(start + column, own + missing[column] / curvature).mul_(kept[start + column])
        torch.sub(best, own, out=moves[column])
        missing[column + 1 :].addr_(hessian[column + 1 :, column], moves[column], alpha=-1)
        columns[start + column] = best
    return moves


def refit_grid(
    weight: torch.Tensor, rounded: torch.Tensor, grid: Grid, hessian: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, Grid]:
    """The best scales and zero points for the codes of a rounded weight, of all groups of a row together.

    With `c` the codes less their zeros, a row is `Σ_g s_g c_g − d_g 1_g`: linear in the scales s and, where zero points
    are floating, in the shifts d, whose least squares under H is one small system a row. A row that does not win by it,
    as its grid is stored, keeps what it had.

    Args:
        weight, rounded, grid, hessian, kept: as `descend`.

    Returns:
        The codes on the new grid, and the grid.
    """
    form, width = grid.form, weight.shape[1]
    scales = expand_groups(grid.scales, width, form.group_size)
    centred = rounded / torch.where(scales == 0, 1, scales)  # [O, I], zero where pruned
    bases = [centred] if grid.zero_points is None or form.zero_point_dtype == "uint8" else [centred, kept.float()]
    found = _least_squares(weight, bases, hessian, form.group_size)
    dtype = grid.scales.dtype
    new_scales = torch.where(found[0].abs() < torch.finfo(dtype).tiny, grid.scales.float(), found[0]).to(dtype)
    zeros = grid.zero_points
    if len(bases) == 2 and zeros is not None:
        zeros = (zeros.float() - found[1] / torch.where(new_scales == 0, 1, new_scales).float()).to(zeros.dtype)
    refitted = Grid(form, new_scales, zeros)
    moved = _on_grid(centred, grid, refitted, kept)
    better = _losses(weight - moved, hessian) < _losses(weight - rounded, hessian)  # [O, 1]
    return torch.where(better, moved, rounded), chosen(better, refitted, grid)


def _on_grid(centred: torch.Tensor, before: Grid, after: Grid, kept: torch.Tensor) -> torch.Tensor:
    """The codes of one grid, given less their zeros, on another one: fp32 `[O, I]`."""
    width, group = centred.shape[1], before.form.group_size
    if before.zero_points is not None and after.zero_points is not None:
        shift = expand_groups(before.zero_points, width, group) - expand_groups(after.zero_points, width, group)
        centred = (centred + shift) * kept
    return centred * expand_groups(after.scales, width, group)


def _least_squares(
    weight: torch.Tensor, bases: list[torch.Tensor], hessian: torch.Tensor, group_size: int | None
) -> list[torch.Tensor]:
    """The factors `[O, G]` of each base `[O, I]`, group by group, whose sum is nearest to a weight under H."""
    group = min(group_size or weight.shape[1], weight.shape[1])
    target = weight @ hessian
    right = torch.cat([group_sums(base * target, group_size) for base in bases], 1).double()  # [O, P]
    rows = []
    for base in bases:
        for begin in range(0, weight.shape[1], group):
            members = slice(begin, begin + group)
            product = base[:, members] @ hessian[members]  # [O, I]
            rows.append(torch.cat([group_sums(product * other, group_size) for other in bases], 1))
    normal = torch.stack(rows, 1).double()  # [O, P, P]
    normal.diagonal(dim1=1, dim2=2).mul_(1 + RIDGE).add_(torch.finfo(torch.float32).tiny)
    solved = torch.cholesky_solve(right.unsqueeze(2), torch.linalg.cholesky(normal)).squeeze(2)
    return list(solved.float().chunk(len(bases), 1))


def _losses(errors: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """What the Hessian charges each row's errors: `[O, 1]` of `[O, I]`."""
    return (errors @ hessian * errors).sum(1, keepdim=True)
