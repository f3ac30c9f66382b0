"""OWL's sparsities: their average, their band, their order."""

import pytest
import torch

from hf_llmkernel.compress.sparsify.allocation import outlier_share, owl_sparsities


def test_outliers_are_scores_above_a_multiple_of_their_mean():
    scores = torch.ones(4, 25)  # mean 1.24: the threshold of 5 times it is 6.2
    scores[0, 0], scores[1, 1], scores[2, 2] = 6.1, 7.0, 13.9
    assert scores.mean() == pytest.approx(1.24)
    assert outlier_share(scores) == 2 / 100
    assert outlier_share(scores, multiple=10.0) == 1 / 100


def test_outliers_of_several_linears_are_counted_against_their_common_mean():
    small, large = torch.ones(2, 50), torch.full((1, 10), 12.0)  # common mean 2; each alone has no outlier
    assert outlier_share(small) == outlier_share(large) == 0
    assert outlier_share(small, large) == 10 / 110


def test_sparsities_average_exactly_and_stay_in_their_band():
    shares = [0.01, 0.05, 0.02, 0.02]
    sparsities = owl_sparsities(shares, 0.7)
    assert sum(sparsities) / 4 == pytest.approx(0.7, abs=1e-12)
    assert min(sparsities) == pytest.approx(0.62)  # the most outliers, and the furthest from the average 0.025
    assert sparsities[0] == pytest.approx(0.7 + 0.08 * 0.015 / 0.025)
    assert sparsities[2] == sparsities[3] == pytest.approx(0.7 + 0.08 * 0.005 / 0.025)


def test_sizes_weight_the_average():
    shares, sizes = [0.01, 0.05, 0.03], [100, 300, 50]
    sparsities = owl_sparsities(shares, 0.5, span=0.1, sizes=sizes)
    removed = sum(size * sparsity for size, sparsity in zip(sizes, sparsities, strict=True))
    assert removed == pytest.approx(0.5 * sum(sizes), rel=1e-12)
    assert max(abs(sparsity - 0.5) for sparsity in sparsities) == pytest.approx(0.1)


def test_equal_layers_and_no_span_are_uniform():
    assert owl_sparsities([0.02, 0.02, 0.02], 0.6) == [0.6, 0.6, 0.6]
    assert owl_sparsities([0.03] * 3, 0.6, sizes=[3, 7, 11]) == [0.6] * 3  # whose average is not 0.03 in floats
    assert owl_sparsities([0.01, 0.05], 0.6, span=0.0) == [0.6, 0.6]


@pytest.mark.parametrize(("sparsity", "span"), [(0.05, 0.08), (0.95, 0.08), (0.5, -0.1), (1.5, 0.08), (0.5, 0.5)])
def test_a_band_that_leaves_a_layer_empty_or_whole_is_refused(sparsity, span):
    with pytest.raises(ValueError, match=f"span={span}: sparsities of {sparsity}"):
        owl_sparsities([0.01, 0.02], sparsity, span)
