"""Masks that keep the highest scores, in exact counts.

A pattern is `"unstructured"`, any positions, or `"N:M"`, N kept of every M consecutive columns; a short last group of g
columns keeps min(N, g). A mask is true where a weight stays.

Shapes: O out_features, I in_features, M columns of a group, R rows of any kind.
"""

import math
import re

import torch

SCOPES = ("row", "layer")
COUNTED_GROUP = 16  # up to so many members counting is faster than selection, which takes M steps and not M²


def kept_of_group(pattern: str) -> tuple[int, int] | None:
    """N and M of a pattern `"N:M"`, `None` of `"unstructured"`. Raises `ValueError` on any other."""
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", str(pattern))
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"pattern={pattern!r}: must be 'unstructured' or 'N:M' with N < M, such as '2:4'.")
    return int(match[1]), int(match[2])


def check_sparsity(sparsity: float | None, pattern: str) -> float:
    """The share of weights to remove that a sparsity and a pattern stand for.

    Raises:
        ValueError: an unknown pattern, a sparsity outside (0, 1), or one that contradicts N:M.
    """
    group = kept_of_group(pattern)
    if sparsity is None and group is not None:
        return 1 - group[0] / group[1]
    if not isinstance(sparsity, int | float) or not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r}: must be above 0 and below 1, the share of weights to remove.")
    if group is not None and not math.isclose(sparsity, 1 - group[0] / group[1], abs_tol=1e-6):
        raise ValueError(
            f"sparsity={sparsity!r}: pattern={pattern!r} removes {1 - group[0] / group[1]:.6g}; leave sparsity out."
        )
    return sparsity


def kept_per_row(in_features: int, sparsity: float) -> int:
    """How many of a row's weights an unstructured sparsity keeps, on average where rows differ."""
    return round(in_features * (1 - sparsity))


def select_mask(
    scores: torch.Tensor, sparsity: float | None, pattern: str = "unstructured", scope: str = "row"
) -> torch.Tensor:
    """The mask of the highest scores; of equal ones the first stay.

    Args:
        scores: `[O, I]`.
        sparsity: share to remove; `None` with N:M.
        pattern: see the module.
        scope: where unstructured weights compete. `"row"` keeps `kept_per_row` in every row, `"layer"` O times that
            anywhere. N:M knows no scope.

    Returns:
        bool `[O, I]`.

    Raises:
        ValueError: an unknown scope, scores that are not numbers, or what `check_sparsity` refuses.
    """
    sparsity = check_sparsity(sparsity, pattern)
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: must be one of {list(SCOPES)}.")
    if scores.isnan().any():
        raise ValueError("scores: some are not a number; look for weights or inputs that are not finite.")
    if (group := kept_of_group(pattern)) is not None:
        return _select_of_groups(scores, *group)
    kept = kept_per_row(scores.shape[1], sparsity)
    if scope == "row":
        return keep_highest(scores, kept)
    return keep_highest(scores.reshape(1, -1), kept * len(scores)).view(scores.shape)


def keep_highest(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The mask of the `kept` highest scores of every row: bool `[R, I]` of `[R, I]`."""
    if kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(scores.shape[1] - kept + 1, dim=1, keepdim=True).values
    mask = scores >= threshold
    if int(mask.sum()) == kept * len(scores):
        return mask
    above = scores > threshold
    ties = mask & ~above
    return above | (ties & (ties.cumsum(1) <= kept - above.sum(1, keepdim=True)))


def keep_highest_of_group(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The mask of the `kept` highest of M scores, all of them where M is less: bool `[M, R]`, R groups side by side.

    In a small group counts for every member how many come before it, several times faster there than selection.
    """
    if len(scores) > COUNTED_GROUP:
        return keep_highest(scores.t(), min(kept, len(scores))).t()
    before = torch.zeros(scores.shape, dtype=torch.int16, device=scores.device)
    for first in range(len(scores)):
        for second in range(first + 1, len(scores)):
            second_wins = scores[second] > scores[first]
            before[first] += second_wins
            before[second] += ~second_wins
    return before < kept


def _select_of_groups(scores: torch.Tensor, kept: int, group: int) -> torch.Tensor:
    out_features, in_features = scores.shape
    whole = in_features // group * group
    grouped = scores[:, :whole].reshape(-1, group).t().contiguous()  # [M, O * I // M]
    mask = keep_highest_of_group(grouped, kept).t().reshape(out_features, whole)
    rest = keep_highest_of_group(scores[:, whole:].t(), kept).t()  # no more than are there
    return torch.cat((mask, rest), dim=1)
