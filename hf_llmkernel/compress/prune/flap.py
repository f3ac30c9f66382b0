"""FLAP (An et al. 2023, arXiv 2312.11983): what fluctuates is missed, what is constant becomes a bias.

The bias is `compensation.mean_bias`, the threshold over modules `width.allocate_widths`.

Shapes: O out_features, I in_features, G groups of columns.
"""

import torch


def input_variance(squares: torch.Tensor, mean: torch.Tensor, count: int) -> torch.Tensor:
    """Unbiased variance of every input over the tokens, fp64 `[I]`.

    Args:
        squares: `[I]`, sums of squares, `diag XᵀX`.
        mean: `[I]`.
        count: tokens.

    Raises:
        ValueError: fewer than 2 tokens.
    """
    if count < 2:
        raise ValueError(f"count={count}: a variance needs at least 2 tokens; calibrate on more text.")
    return ((squares.double() - count * mean.double().square()) / (count - 1)).clamp(min=0)


def flap_scores(weight: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """`Var(X_j) ‖w_j‖₂²` (its fluctuation metric), fp32 `[I]`: the loss that a mean bias leaves of column j.

    Args:
        weight: `[O, I]`.
        variance: `[I]`, of the inputs.
    """
    return (variance.double() * weight.double().square().sum(dim=0)).float()


def standardize(scores: torch.Tensor) -> torch.Tensor:
    """`(s − mean s) / std s` over a module's scores `[G]`, so that modules can share one threshold; fp32 `[G]`.

    Scores that are all equal become zeros.
    """
    centred = scores.double() - scores.double().mean()
    deviation = centred.square().mean().sqrt()
    return (centred / torch.where(deviation > 0, deviation, 1)).float()
