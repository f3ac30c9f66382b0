"""The mathematics of neuron pruning against references written another way."""

import numpy as np
import pytest
import torch

from hf_llmkernel.compress.prune_ffn import (
    PruneFFN,
    ffn_neuron_scores,
    least_squares_columns,
    pruned_width,
    select_neurons,
)

TOKENS, IN, OUT = 200, 24, 10


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN, IN, generator=generator)  # correlated inputs, as real ones are
    inputs = torch.randn(TOKENS, IN, generator=generator) @ mixing
    return inputs, torch.randn(OUT, IN, generator=generator)


def test_a_score_is_the_size_of_what_the_neuron_adds_to_the_output(layer):
    inputs, weight = layer
    contributions = [np.outer(inputs[:, j].numpy(), weight[:, j].numpy()) for j in range(IN)]
    expected = [np.sqrt((contribution.astype(np.float64) ** 2).sum()) for contribution in contributions]
    scores = ffn_neuron_scores(weight, inputs.norm(dim=0))
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)


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
    with pytest.raises(ValueError, match=rf"ratio={ratio} of {width} neurons .* align=64"):
        pruned_width(width, ratio, align=64)


def test_the_highest_scores_stay_in_order():
    scores = torch.rand(40, generator=torch.Generator().manual_seed(1))
    best = sorted(range(40), key=lambda index: -scores[index])[:24]
    assert select_neurons(scores, ratio=0.4, align=8).tolist() == sorted(best)


@pytest.mark.parametrize("dampening", [0.0, 0.01, 1.0])
def test_update_solves_the_least_squares_problem(layer, dampening):
    inputs, weight = layer
    keep = torch.tensor([0, 2, 3, 7, 8, 9, 13, 20])
    x, w = inputs.double().numpy(), weight.double().numpy()
    ridge = np.sqrt(dampening * np.mean((x**2).sum(0)))
    rows = np.concatenate([x[:, keep], ridge * np.eye(len(keep))])
    targets = np.concatenate([x @ w.T, ridge * w[:, keep].T])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    updated = least_squares_columns(weight, inputs.T @ inputs, keep, dampening)
    np.testing.assert_allclose(updated.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_update_lowers_the_error_on_the_tokens_it_saw(layer):
    inputs, weight = layer
    keep = select_neurons(ffn_neuron_scores(weight, inputs.norm(dim=0)), ratio=0.25, align=1)
    output = inputs @ weight.T
    plain = (inputs[:, keep] @ weight[:, keep].T - output).norm()
    updated = (inputs[:, keep] @ least_squares_columns(weight, inputs.T @ inputs, keep).T - output).norm()
    assert updated < 0.5 * plain


def test_singular_gram_without_dampening_is_named():
    inputs = torch.ones(5, 4)
    with pytest.raises(ValueError, match="dampening=0.0: .*singular"):
        least_squares_columns(torch.ones(2, 4), inputs.T @ inputs, torch.tensor([0, 1, 2]), 0.0)


@pytest.mark.parametrize("ratio", [0, 0.0, 1, 1.5, -0.1, True, "half", None])
def test_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio="):
        PruneFFN(ratio=ratio)


@pytest.mark.parametrize(
    "settings", [{"align": 0}, {"method": "magic"}, {"update": "some"}, {"dampening": -1}, {"layers": [3, 3]}]
)
def test_other_settings_outside_their_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        PruneFFN(ratio=0.5, **settings)
