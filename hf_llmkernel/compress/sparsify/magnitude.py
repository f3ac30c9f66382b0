"""Magnitude scores: the size of a weight.

Shapes: O out_features, I in_features.
"""

import torch


def magnitude_scores(weight: torch.Tensor) -> torch.Tensor:
    """`|W|`, fp32 `[O, I]` of `[O, I]`."""
    return weight.float().abs()
