"""Truncated singular value decomposition of a weight, blind to its inputs.

Shapes: O out_features, I in_features, R rank.
"""

from typing import NamedTuple

import torch


class Factors(NamedTuple):
    """The two linears of `y = b(a(x))`, as `LowRankLinear` stores them: a fp32 `[R, I]`, b fp32 `[O, R]`."""

    a: torch.Tensor
    b: torch.Tensor


def truncated_svd(weight: torch.Tensor, rank: int) -> Factors:
    """The factors `U Σ^½` and `Σ^½ Vᵀ` of the nearest matrix of a rank (Eckart and Young 1936).

    Args:
        weight: `[O, I]`.
        rank: R, at most min(O, I).
    """
    u, sigma, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    root = sigma[:rank].sqrt()
    return Factors(root.unsqueeze(1) * vt[:rank], u[:, :rank] * root)
