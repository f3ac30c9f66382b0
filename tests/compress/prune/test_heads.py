"""Which heads go together, and the rows and columns that go with them."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from hf_llmkernel.compress.prune.heads import (
    head_indices,
    head_scores,
    pruned_heads,
    select_heads,
    value_rows,
)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ratio", "scheme", "kept"),
    [
        (9, 3, 0.25, "groups", (6, 2)),  # 6.75 lies nearer to 6 than to 9
        (9, 3, 0.25, "within_groups", (6, 3)),
        (32, 8, 0.25, "groups", (24, 6)),
        (32, 8, 0.25, "within_groups", (24, 8)),
        (12, 12, 0.3, "groups", (8, 8)),  # each head its own group
        (8, 1, 0.4, "within_groups", (5, 1)),
        (8, 2, 0.25, "groups", (4, 1)),  # 6 lies in the middle: the smaller
    ],
)
def test_the_nearest_legal_number_stays(heads, kv_heads, ratio, scheme, kept):
    assert pruned_heads(heads, kv_heads, ratio, scheme) == kept


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ratio", "scheme"),
    [(8, 1, 0.5, "groups"), (4, 4, 0.5, "within_groups"), (9, 3, 0.1, "groups"), (9, 3, 0.9, "groups")],
)
def test_a_number_that_is_none_or_all_is_refused(heads, kv_heads, ratio, scheme):
    with pytest.raises(ValueError, match=f"ratio={ratio}: of {heads} heads .*scheme='{scheme}'"):
        pruned_heads(heads, kv_heads, ratio, scheme)


def test_an_unknown_scheme_names_the_known():
    with pytest.raises(ValueError, match="scheme='rows': must be one of .*within_groups"):
        pruned_heads(8, 2, 0.5, "rows")


@pytest.mark.parametrize(("kept_heads", "kept_kv_heads"), [(6, 2), (8, 4), (4, 4), (2, 2), (9, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_legal_choice_scores_higher(kept_heads, kept_kv_heads, seed):
    heads, kv_heads, each = 12, 4, kept_heads // kept_kv_heads
    scores = torch.rand(heads, generator=torch.Generator().manual_seed(seed))
    best = max(
        (
            [head for members in choice for head in members]
            for groups in itertools.combinations(range(kv_heads), kept_kv_heads)
            for choice in itertools.product(
                *(itertools.combinations(range(3 * group, 3 * group + 3), each) for group in groups)
            )
        ),
        key=lambda chosen: float(scores[chosen].sum()),
    )
    kept = select_heads(scores, kv_heads, kept_heads, kept_kv_heads)
    assert kept.query.tolist() == best
    assert kept.key_value.tolist() == sorted({head // 3 for head in best})


@pytest.mark.parametrize(("kept_heads", "kept_kv_heads"), [(5, 2), (8, 2), (15, 5), (0, 2)])
def test_numbers_that_cannot_be_shared_are_refused(kept_heads, kept_kv_heads):
    with pytest.raises(ValueError, match=f"kept_heads={kept_heads}: .*kept_kv_heads={kept_kv_heads}"):
        select_heads(torch.rand(12), 4, kept_heads, kept_kv_heads)


def test_a_head_scores_the_sum_over_its_columns():
    columns = torch.rand(12, generator=torch.Generator().manual_seed(0))
    assert head_scores(columns, 4).tolist() == pytest.approx([float(columns[h : h + 4].sum()) for h in (0, 4, 8)])


def attention(x, q, k, v, o, heads, kv_heads):
    """Causal attention with shared kv heads, the outputs `[T, H]`."""
    split = [
        (x @ w.T).view(1, len(x), count, -1).transpose(1, 2)
        for w, count in zip((q, k, v), (heads, kv_heads, kv_heads), strict=True)
    ]
    mixed = F.scaled_dot_product_attention(*split, is_causal=True, enable_gqa=True)
    return mixed.transpose(1, 2).reshape(len(x), -1) @ o.T


@pytest.mark.parametrize(("kept_heads", "kept_kv_heads"), [(4, 2), (6, 3), (3, 3), (4, 4), (8, 4)])
def test_heads_without_effect_can_go(kept_heads, kept_kv_heads):
    """Zero columns of o_proj for the heads that go: attention with the rows and columns of the rest is the same."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, dim, hidden = 8, 4, 4, 6
    q, k, v = (torch.randn(rows * dim, hidden, generator=generator) for rows in (heads, kv_heads, kv_heads))
    o = torch.randn(hidden, heads * dim, generator=generator)
    kept = select_heads(torch.rand(heads, generator=generator), kv_heads, kept_heads, kept_kv_heads)
    queries, keys = head_indices(kept.query, dim), head_indices(kept.key_value, dim)
    zeroed = torch.zeros_like(o).index_copy_(1, queries, o[:, queries])
    x = torch.randn(7, hidden, generator=generator)
    expected = attention(x, q, k, v, zeroed, heads, kv_heads)
    actual = attention(x, q[queries], k[keys], v[keys], o[:, queries], kept_heads, kept_kv_heads)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_value_rows_feed_the_columns_of_o():
    """With one token attention is the values themselves."""
    generator = torch.Generator().manual_seed(0)
    v, o = torch.randn(6, 5, generator=generator), torch.randn(3, 12, generator=generator)
    x = torch.randn(1, 5, generator=generator)
    q, k = torch.zeros(12, 5), torch.zeros(6, 5)
    rows = value_rows(heads=4, kv_heads=2, head_dim=3)
    torch.testing.assert_close(x @ v[rows].T @ o.T, attention(x, q, k, v, o, 4, 2))
