"""Widths against exhaustive searches."""

import pytest
import torch

from hf_llmkernel.compress.prune.width import allocate_widths, pruned_width, select


@pytest.mark.parametrize(
    ("width", "ratio", "align", "kept"),
    [
        (1536, 1 / 8, 64, 1344),  # exact
        (1536, 0.25, 64, 1152),
        (1000, 0.25, 64, 768),  # 750 lies between 704 and 768
        (1000, 0.25, 1, 750),
        (128, 0.25, 64, 64),  # 96 lies in the middle: the smaller
        (11008, 0.2, 64, 8832),
    ],
)
def test_width_is_the_nearest_multiple(width, ratio, align, kept):
    assert pruned_width(width, ratio, align) == kept
    target = width * (1 - ratio)
    assert all(abs(kept - target) <= abs(other - target) for other in range(align, width, align))


@pytest.mark.parametrize(("width", "ratio"), [(64, 0.1), (64, 0.9), (1536, 0.01)])
def test_a_width_that_is_none_or_all_is_refused(width, ratio):
    with pytest.raises(ValueError, match=rf"ratio={ratio}: of {width} .* align=64"):
        pruned_width(width, ratio, align=64)


def test_the_highest_scores_stay_in_order():
    scores = torch.rand(40, generator=torch.Generator().manual_seed(1))
    best = sorted(range(40), key=lambda index: -scores[index])[:24]
    assert select(scores, 24).tolist() == sorted(best)


def test_of_equal_scores_the_first_stay():
    assert select(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3).tolist() == [0, 1, 2]


def modules(seed=0, widths=(48, 48, 30, 6)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(width, generator=generator) + shift for shift, width in enumerate(widths)]


def nearest_width(count, width, align, minimum):
    """By trying every multiple, the smaller of two first."""
    if count == width:
        return width
    legal = [multiple for multiple in range(0, width + align, align) if multiple >= min(minimum, width)]
    return min(min(legal, key=lambda multiple: abs(multiple - count)), width)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_threshold_comes_nearer(ratio, seed):
    scores, aligns, minimums, parameters = modules(seed), [8, 8, 4, 1], [8, 8, 4, 2], [3, 3, 3, 40]
    kept = allocate_widths(scores, ratio, aligns, minimums, parameters)
    target = (1 - ratio) * sum(len(module) * cost for module, cost in zip(scores, parameters, strict=True))
    outcomes = {}
    for threshold in [*torch.cat(scores).tolist(), float("inf")]:
        counts = [sum(score >= threshold for score in module.tolist()) for module in scores]
        widths = [
            nearest_width(count, len(module), *rule)
            for count, module, *rule in zip(counts, scores, aligns, minimums, strict=True)
        ]
        outcomes[tuple(widths)] = sum(width * cost for width, cost in zip(widths, parameters, strict=True))
    assert outcomes[tuple(kept)] == min(outcomes.values(), key=lambda total: (abs(total - target), total))


def test_without_alignment_every_score_kept_is_above_every_score_removed():
    scores = modules()
    kept = allocate_widths(scores, 0.4, align=1)
    assert sum(kept) == round(0.6 * sum(map(len, scores)))
    ranked = [module.sort(descending=True).values for module in scores]
    lowest = min(float(module[count - 1]) for module, count in zip(ranked, kept, strict=True))
    assert all(module[count] < lowest for module, count in zip(ranked, kept, strict=True) if count < len(module))


def test_minimum_holds_against_the_lowest_scores():
    scores = [torch.zeros(64) - 9, torch.rand(64, generator=torch.Generator().manual_seed(0))]
    assert allocate_widths(scores, 0.5, align=8, minimum=1) == [8, 56]
    assert allocate_widths(scores, 0.5, align=8, minimum=17) == [24, 40]


def test_of_two_totals_equally_near_the_smaller():
    assert allocate_widths([torch.arange(4.0)], 0.375, align=1) == [2]  # 2.5 lies between 2 and 3


def test_of_two_multiples_equally_near_the_smaller():
    scores = [torch.tensor([1.0] * 6 + [0.0] * 2), torch.ones(8)]  # 6 lies between 4 and 8
    assert allocate_widths(scores, 0.25, align=4) == [4, 8]


def test_a_threshold_above_all_scores_leaves_the_minimum():
    assert allocate_widths([torch.ones(64)], 0.7, align=8, minimum=16) == [16]


def test_a_width_that_keeps_all_need_not_be_a_multiple():
    scores = [torch.ones(50), torch.zeros(64).index_fill(0, torch.arange(32), 1.0)]
    assert allocate_widths(scores, 0.28, align=16) == [50, 32]


def test_ratio_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="ratio=0.9: .*minimum=16"):
        allocate_widths(modules(), 0.9, align=8, minimum=16)
    with pytest.raises(ValueError, match="ratio=0.001: too small"):
        allocate_widths(modules(), 0.001, align=8)
