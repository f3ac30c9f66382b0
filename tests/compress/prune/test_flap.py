"""FLAP's scores against two passes over the inputs, and against the loss they stand for."""

import pytest
import torch

from hf_llmkernel.compress.prune.compensation import mean_bias
from hf_llmkernel.compress.prune.flap import flap_scores, input_variance, standardize
from tests.compress.prune.conftest import IN, TOKENS


def variance_of(layer):
    return input_variance(layer.gram.diagonal(), layer.mean, TOKENS)


def test_variance_is_that_of_two_passes(layer):
    expected = [((column - column.mean()) ** 2).sum() / (TOKENS - 1) for column in layer.inputs.double().T]
    torch.testing.assert_close(variance_of(layer), torch.stack(expected), rtol=1e-5, atol=0)


def test_a_constant_input_has_no_variance_below_zero():
    squares = torch.tensor([3 * 0.1**2])
    assert float(input_variance(squares, torch.tensor([0.1]), 3)) == pytest.approx(0, abs=1e-8)
    assert float(input_variance(squares * 0.9, torch.tensor([0.1]), 3)) == 0


def test_one_token_has_no_variance():
    with pytest.raises(ValueError, match="count=1: .*at least 2"):
        input_variance(torch.ones(3), torch.ones(3), 1)


def test_a_score_is_the_loss_a_token_that_the_mean_bias_leaves(layer):
    scores = flap_scores(layer.weight, variance_of(layer))
    for j in range(IN):
        keep = torch.tensor([k for k in range(IN) if k != j])
        pruned = mean_bias(layer.weight, layer.mean, keep)
        loss = layer.loss(pruned.weight, keep, pruned.bias) / (TOKENS - 1)
        torch.testing.assert_close(scores[j].double(), loss, rtol=1e-4, atol=0)


def test_standardized_scores_have_mean_zero_and_deviation_one():
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 1e6
    standard = standardize(scores).double()
    assert abs(standard.mean()) < 1e-6
    assert standard.square().mean() == pytest.approx(1, rel=1e-5)
    assert torch.equal(standard.argsort(), scores.argsort())
    torch.testing.assert_close(standardize(scores * 1e-9 - 7e-9), standard.float(), rtol=1e-3, atol=1e-4)


def test_equal_scores_standardize_to_zero():
    assert standardize(torch.full((5,), 3.0)).tolist() == [0] * 5
