"""Wanda scores (Sun et al. 2023, arXiv 2306.11695, section 3): the size of what a weight adds to its output.

Shapes: O out_features, I in_features.
"""

import torch


def wanda_scores(weight: torch.Tensor, input_norms: torch.Tensor) -> torch.Tensor:
    """`|W_ij| ‖X_j‖₂`; the paper lets a row's weights compete (scope `"row"`) and leaves those that stay alone.

    Args:
        weight: `[O, I]`.
        input_norms: `[I]`, norms of the inputs over all tokens, the root of the Gram matrix's diagonal.

    Returns:
        fp32 `[O, I]`.
    """
    return weight.float().abs() * input_norms.float()
