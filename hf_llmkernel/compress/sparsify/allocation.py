"""OWL (Yin et al. 2023, arXiv 2310.05175, section 3): layers with more outliers lose fewer weights.

Shapes: O out_features, I in_features, L layers.
"""

from collections.abc import Sequence

import torch


def outlier_share(*scores: torch.Tensor, multiple: float = 5.0) -> float:
    """The share of a layer's Wanda scores above `multiple` times their mean, over all its linears, `[O, I]` each."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > multiple * mean).sum()) for score in scores) / count


def owl_sparsities(
    outlier_shares: Sequence[float], sparsity: float, span: float = 0.08, sizes: Sequence[int] | None = None
) -> list[float]:
    """A sparsity for every layer, falling linearly with its share of outliers, that averages to `sparsity`.

    The layer furthest from the average lies `span` away from it, so that all lie within `span`; the paper's code
    stretches the whole range to twice the span, which may leave the band on one side.

    Args:
        outlier_shares: L of `outlier_share`.
        sparsity: the average, weighted by size.
        span: largest distance from it; 0.08 in the paper.
        sizes: weights of every layer; by default all are of one size.

    Raises:
        ValueError: a sparsity or span that leaves a layer without weights, or whole.
    """
    if not 0 <= span < min(sparsity, 1 - sparsity):
        raise ValueError(
            f"span={span}: sparsities of {sparsity} ± span must stay above 0 and below 1; lower span, or set sparsity "
            "between 0 and 1."
        )
    shares = torch.tensor(outlier_shares, dtype=torch.float64)
    weights = torch.ones_like(shares) if sizes is None else torch.tensor(sizes, dtype=torch.float64)
    deviation = shares - (shares * weights).sum() / weights.sum()
    furthest = float(deviation.abs().max())
    if furthest < 1e-12:  # below any share of a count: rounding of equal ones
        return [sparsity] * len(shares)
    return (sparsity - span * deviation / furthest).tolist()
