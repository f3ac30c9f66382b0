"""Optimal brain surgeon over columns (Hassibi and Stork 1993; ZipLM, Kurtic et al. 2023, arXiv 2302.04089).

What a column carries, correlated ones can take over. The score of a group g of columns is what is then still lost:
the smallest `‖X Wᵀ − X Vᵀ‖²` of any V that is zero on g, which is `tr(W_g ((G⁻¹)_gg)⁻¹ W_gᵀ)` with `G = XᵀX`.

Shapes: O out_features, I in_features, D columns a group, N groups, P columns removed, K columns kept.
"""

import math

import torch

from ..solve import damped_cholesky


def obs_scores(
    weight: torch.Tensor, gram: torch.Tensor, group_size: int = 1, dampening: float = 0.01
) -> tuple[torch.Tensor, float]:
    """The loss of removing each group alone, all other columns compensating.

    Two columns that replace each other both score low: to remove several, use `obs_select`.

    Args:
        weight: `[O, I]`.
        gram: `[I, I]`, `XᵀX`; `compensation.centred_gram` where a bias compensates too.
        group_size: D, 1 for neurons, head_dim for heads.
        dampening: as `damped_cholesky`.

    Returns:
        fp32 `[N]`, and the dampening used.
    """
    factor, used = damped_cholesky(gram, dampening)
    return _losses(weight.double(), torch.cholesky_inverse(factor), group_size).float(), used


def obs_select(
    weight: torch.Tensor,
    gram: torch.Tensor,
    count: int,
    group_size: int = 1,
    rounds: int = 16,
    dampening: float = 0.01,
) -> tuple[torch.Tensor, float]:
    """The groups to keep, found by removing the least in rounds; after each the rest has compensated.

    Args:
        weight, gram, group_size, dampening: as `obs_scores`.
        count: groups to keep.
        rounds: as many as groups to remove is one at a time, 1 is `obs_scores` alone; 16 select as well as the former.

    Returns:
        Indices, ascending int64 `[count]`, and the dampening used.
    """
    factor, used = damped_cholesky(gram, dampening)
    weight, inverse = weight.double(), torch.cholesky_inverse(factor)
    groups = torch.arange(weight.shape[1] // group_size, device=weight.device)
    step = math.ceil((len(groups) - count) / rounds)
    while len(groups) > count:
        least = _losses(weight, inverse, group_size).argsort(stable=True)[: min(step, len(groups) - count)]
        stays = torch.ones_like(groups, dtype=torch.bool)
        stays[least] = False
        weight, inverse = _eliminate(weight, inverse, stays.repeat_interleave(group_size))
        groups = groups[stays]
    return groups, used


def _losses(weight: torch.Tensor, inverse: torch.Tensor, group_size: int) -> torch.Tensor:
    """`tr(W_g ((G⁻¹)_gg)⁻¹ W_gᵀ)` of every group, fp64 `[N]`."""
    columns = weight.T.reshape(-1, group_size, len(weight))  # [N, D, O]
    count = len(columns)
    blocks = inverse.view(count, group_size, count, group_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [N, D, D]
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), columns, upper=False)
    return whitened.square().sum(dim=(1, 2))


def _eliminate(weight: torch.Tensor, inverse: torch.Tensor, stays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `[O, K]` with the removed columns compensated, and `(G_kk)⁻¹`, the inverse's Schur complement."""
    coupling = inverse[~stays][:, stays]  # [P, K]
    removed = torch.linalg.cholesky(inverse[~stays][:, ~stays])
    shares = torch.cholesky_solve(coupling, removed)
    return weight[:, stays] - weight[:, ~stays] @ shares, inverse[stays][:, stays] - coupling.T @ shares
