"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774): column by column, each makes up for the one before it.

Removing w_ij costs row i `w_ij² / U_jj²` once all its columns after j have moved by `−(w_ij / U_jj) U_j,·`, with U the
upper Cholesky factor of the inverse Hessian. Columns before j stay as they are.

Shapes: O out_features, I in_features, B columns of a block. Inside, weights are transposed: a column is one row.
"""

import torch

from ..solve import damped_inverse_cholesky
from .mask import check_sparsity, keep_highest, keep_highest_of_group, kept_of_group, kept_per_row
from .reconstruction import Reconstruction

DAMPENING = 0.01


def sparsegpt(
    weight: torch.Tensor,
    gram: torch.Tensor,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    mask: torch.Tensor | None = None,
    block_size: int = 128,
    dampening: float = DAMPENING,
) -> Reconstruction:
    """Algorithm 1 of the paper: mask and weights in one pass, or the weights alone on a given mask.

    Unstructured weights compete within a block of columns, over all rows; the blocks' counts add up to exactly
    O · `kept_per_row`. N:M is decided where a group begins. Inputs that never occur lose their weights.

    Args:
        weight: `[O, I]`.
        gram: XᵀX, `[I, I]`.
        sparsity: share to remove; `None` with N:M, and with a mask.
        pattern: `"unstructured"` or `"N:M"`; a mask needs none.
        mask: bool `[O, I]`, true where weights stay; by default chosen here.
        block_size: B; for N:M the multiple of M below it, or M.
        dampening: of the Gram matrix, relative to the mean of its diagonal; raised where needed.

    Raises:
        ValueError: what `check_sparsity` and `damped_cholesky` refuse.
    """
    weight, gram = without_dead_inputs(weight, gram)
    upper, used = damped_inverse_cholesky(gram, dampening)
    return Reconstruction(*compensate(weight, upper.float(), mask, sparsity, pattern, block_size), used)


def without_dead_inputs(weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight, fp32, and Gram matrix, with zero weights and a diagonal of one for inputs that are zero on all tokens."""
    dead = gram.diagonal() == 0
    return weight.float().masked_fill(dead, 0), gram.float() + torch.diag(dead.float())


def compensate(
    weight: torch.Tensor,
    upper: torch.Tensor,
    mask: torch.Tensor | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pass over the columns: new weight and mask `[O, I]` from weight and U, both fp32; the rest as `sparsegpt`."""
    sparsity = check_sparsity(sparsity, pattern) if mask is None else 0.0
    group = kept_of_group(pattern) if mask is None else None
    if group is not None:
        block_size = max(block_size // group[1], 1) * group[1]
    columns = weight.t().clone(memory_format=torch.contiguous_format)  # [I, O]
    kept = torch.zeros_like(columns, dtype=torch.bool) if mask is None else mask.t().contiguous()
    for start in range(0, len(columns), block_size):
        block = slice(start, min(start + block_size, len(columns)))
        if mask is None and group is None:
            count = _kept_before(block.stop, weight.shape, sparsity) - _kept_before(start, weight.shape, sparsity)
            scores = (columns[block] / upper.diagonal()[block].unsqueeze(1)).abs()
            kept[block] = keep_highest(scores.view(1, -1), count).view(scores.shape)
        errors = _compensate_in_block(columns[block], kept[block], upper[block, block], group)
        columns[block.stop :].addmm_(upper[block, block.stop :].t(), errors, alpha=-1)
    return (columns * kept).t().contiguous(), kept.t().contiguous()


def _kept_before(column: int, shape: torch.Size, sparsity: float) -> int:
    """How many weights the columns before one keep; the last column's count is exact."""
    out_features, in_features = shape
    return out_features * kept_per_row(in_features, sparsity) * column // in_features


def _compensate_in_block(
    columns: torch.Tensor, kept: torch.Tensor, upper: torch.Tensor, group: tuple[int, int] | None
) -> torch.Tensor:
    """Changes the columns `[B, O]` of a block in place, and with N:M its mask; returns their errors `[B, O]`."""
    diagonal = upper.diagonal().unsqueeze(1)  # [B, 1]
    errors = torch.empty_like(columns)
    share = ~kept / diagonal  # of a column that goes into its error
    for column in range(len(columns)):
        if group is not None and column % group[1] == 0:
            members = slice(column, column + group[1])
            kept[members] = keep_highest_of_group((columns[members] / diagonal[members]).abs(), group[0])
            share[members] = ~kept[members] / diagonal[members]
        torch.mul(columns[column], share[column], out=errors[column])
        columns[column + 1 :].addr_(upper[column, column + 1 :], errors[column], alpha=-1)
    return errors
