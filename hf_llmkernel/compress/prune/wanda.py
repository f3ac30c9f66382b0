"""Wanda (Sun et al. 2023, arXiv 2306.11695, section 3) over whole columns.

Shapes: O out_features, I in_features.
"""

import torch


def wanda_scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """`‖x_j‖₂ ‖w_j‖₂`: the size of the rank-one matrix `x_j w_jᵀ` that column j adds to the outputs of all tokens.

    Args:
        weight: `[O, I]`.
        norms: `[I]`, norms of the inputs over the tokens, `sqrt(diag XᵀX)`.

    Returns:
        fp32 `[I]`.
    """
    return norms.float() * weight.float().norm(dim=0)
