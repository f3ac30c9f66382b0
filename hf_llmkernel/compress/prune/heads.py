"""Attention heads that may go together, where query heads share key/value heads.

Query head h attends with kv head h // (N / K). A kv head goes with all its query heads, and every kv head that stays
serves as many query heads as any other.

Shapes: N query heads, K kv heads, D head_dim.
"""

import math
from typing import NamedTuple

import torch

SCHEMES = ("groups", "within_groups")


class KeptHeads(NamedTuple):
    """Ascending int64 indices of the query heads and of the kv heads that stay."""

    query: torch.Tensor
    key_value: torch.Tensor


def pruned_heads(heads: int, kv_heads: int, ratio: float, scheme: str = "groups") -> tuple[int, int]:
    """How many query heads and kv heads stay: the legal number of query heads nearest to `heads * (1 - ratio)`.

    Args:
        heads: N.
        kv_heads: K, divides N.
        ratio: share of the query heads to remove.
        scheme: `"groups"` removes kv heads, each with its N / K query heads; `"within_groups"` the same number of query
            heads from every kv head.

    Returns:
        The numbers kept; of two that are equally near the smaller.

    Raises:
        ValueError: an unknown scheme, or a number that is none or all of the heads.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r}: must be one of {list(SCHEMES)}.")
    step = heads // kv_heads if scheme == "groups" else kv_heads
    target = heads * (1 - ratio)
    kept = math.ceil(target / step - 0.5) * step
    if not 0 < kept < heads:
        raise ValueError(
            f"ratio={ratio}: of {heads} heads leaves {target:g}, nearest multiple of {step} {kept} ({kv_heads} kv "
            f"heads, scheme={scheme!r}); change ratio or scheme."
        )
    return (kept, kept // step) if scheme == "groups" else (kept, kv_heads)


def select_heads(scores: torch.Tensor, kv_heads: int, kept_heads: int, kept_kv_heads: int) -> KeptHeads:
    """The best `kept_heads / kept_kv_heads` query heads of each of the best `kept_kv_heads` groups.

    A group is as good as the sum of those of its heads that would stay.

    Args:
        scores: `[N]`, of query heads.
        kv_heads: K, before.
        kept_heads, kept_kv_heads: as `pruned_heads` counts them.

    Raises:
        ValueError: numbers that leave kv heads with unequal numbers of query heads, or with more than there are.
    """
    by_group = scores.view(kv_heads, -1)  # [K, N / K]
    each, rest = divmod(kept_heads, kept_kv_heads)
    if rest or not 0 < each <= by_group.shape[1] or kept_kv_heads > kv_heads:
        raise ValueError(
            f"kept_heads={kept_heads}: cannot share kept_kv_heads={kept_kv_heads} evenly out of {len(scores)} heads "
            f"and {kv_heads} kv heads; keep an equal number of query heads for every kv head."
        )
    ranked = by_group.argsort(dim=1, descending=True, stable=True)[:, :each]
    totals = by_group.gather(1, ranked).sum(dim=1)
    groups = totals.argsort(descending=True, stable=True)[:kept_kv_heads].sort().values
    query = groups.unsqueeze(1) * by_group.shape[1] + ranked[groups].sort(dim=1).values
    return KeptHeads(query.flatten(), groups)


def head_scores(column_scores: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Scores of heads `[N]`: sums over their columns of o_proj, of scores `[N * D]`."""
    return column_scores.view(-1, head_dim).sum(dim=1)


def head_indices(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q_proj and columns of o_proj of query heads, or rows of k_proj and v_proj of kv heads: `[len * D]`."""
    return (heads.unsqueeze(1) * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def value_rows(heads: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """The row of v_proj that feeds each column of o_proj, int64 `[N * D]`."""
    kv_head = torch.arange(heads) // (heads // kv_heads)
    return head_indices(kv_head, head_dim)
