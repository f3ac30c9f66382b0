"""HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"): zero points without data.

Minimizes the l_p norm, p below 1, of `W − (code − zero) · scale` over the zero points, so that few weights far off
count less than many a little off. Half-quadratic splitting takes turns: a shrunk error E, then the zero points that are
best for W − E.

Shapes: O out_features, I in_features, G groups of columns.
"""

import torch

from ...model.configuration_llm_kernel import LinearForm
from ...model.linear_llm_kernel import expand_groups, quantize, round_to_nearest
from .gptq import Rounded
from .grid import Grid, group_sums

NORM = 0.7
BETA, KAPPA = 10.0, 1.01
STEPS = 20


def hqq(weight: torch.Tensor, form: LinearForm, mask: torch.Tensor | None = None) -> Rounded:
    """Round to nearest on zero points of least `‖W − Q‖_p^p`.

    Steps as the method's own implementation takes them, until the mean error grows; but what it was before is kept.

    Args:
        weight: `[O, I]`, zero where it is pruned.
        form: an integer form with floating zero points.
        mask: bool `[O, I]`, true where weights stay; by default all do.
    """
    weight = weight.float()
    kept = torch.ones_like(weight) if mask is None else mask.float()
    scales, found = round_to_nearest(weight, form)
    assert found is not None and found.is_floating_point(), "the stage takes no other form"
    scale = expand_groups(scales, weight.shape[1], form.group_size)
    counts = group_sums(kept, form.group_size).clamp(min=1)
    zeros = best = found.float()
    beta, least = BETA, torch.inf
    for _ in range(STEPS):
        codes = quantize(weight, form, scales, zeros).float()
        error = (weight - (codes - expand_groups(zeros, weight.shape[1], form.group_size)) * scale) * kept
        mean = float(error.abs().sum() / kept.sum())
        if mean >= least:
            break
        least, best = mean, zeros
        wanted = codes - (weight - shrink(error, beta)) / torch.where(scale == 0, 1, scale)
        zeros = group_sums(wanted * kept, form.group_size) / counts
        beta *= KAPPA
    grid = Grid(form, scales, best.to(found.dtype))
    return Rounded(grid.nearest(weight) * kept, grid, 0.0)


def shrink(error: torch.Tensor, beta: float) -> torch.Tensor:
    """The generalized soft threshold `sign(x) · max(|x| − |x|^(p−1) / β, 0)`, p = 0.7."""
    size = error.abs()
    return error.sign() * (size - size.pow(NORM - 1) / beta).clamp(min=0)
