"""Compensations against least squares solved on the inputs themselves."""

import numpy as np
import pytest
import torch

from hf_llmkernel.compress.prune.compensation import (
    centred_gram,
    least_squares_columns,
    least_squares_with_bias,
    mean_bias,
)
from tests.compress.prune.conftest import IN, TOKENS

KEEP = torch.tensor([0, 2, 3, 7, 8, 9, 13, 20])


def ridge(inputs, weight, dampening):
    """Weights of the kept inputs by lstsq: the change is held back by rows that ask for none."""
    x, w = inputs.double().numpy(), weight.double().numpy()
    kept = x[:, KEEP]
    hold = np.sqrt(dampening * np.mean((kept**2).sum(0))) * np.eye(len(KEEP))
    targets = np.concatenate([x @ w.T, hold @ w[:, KEEP].T])
    return np.linalg.lstsq(np.concatenate([kept, hold]), targets, rcond=None)[0].T


@pytest.mark.parametrize("dampening", [0.0, 0.01, 1.0])
def test_least_squares_solves_the_problem(layer, dampening):
    solved = least_squares_columns(layer.weight, layer.gram, KEEP, dampening)
    np.testing.assert_allclose(
        solved.weight.numpy(), ridge(layer.inputs, layer.weight, dampening), rtol=1e-3, atol=1e-4
    )
    assert solved.bias is None
    assert solved.dampening == dampening


@pytest.mark.parametrize("dampening", [0.0, 0.01])
def test_least_squares_with_bias_solves_the_problem_with_an_intercept(layer, dampening):
    solved = least_squares_with_bias(layer.weight, layer.gram, layer.mean, TOKENS, KEEP, dampening)
    centred = layer.inputs.double() - layer.inputs.double().mean(0)
    expected = ridge(centred, layer.weight, dampening)
    np.testing.assert_allclose(solved.weight.numpy(), expected, rtol=1e-3, atol=1e-3)
    kept = layer.inputs[:, KEEP].double()
    residual = layer.inputs.double() @ layer.weight.double().T - kept @ solved.weight.double().T
    assert solved.bias is not None
    torch.testing.assert_close(solved.bias.double(), residual.mean(0), rtol=1e-4, atol=1e-5)


def test_without_dampening_the_intercept_is_that_of_a_column_of_ones(layer):
    ones = torch.ones(TOKENS, 1, dtype=torch.float64)
    inputs = torch.cat([layer.inputs[:, KEEP].double(), ones], dim=1)
    expected = torch.linalg.lstsq(inputs, layer.inputs.double() @ layer.weight.double().T).solution
    solved = least_squares_with_bias(layer.weight, layer.gram, layer.mean, TOKENS, KEEP, 0)
    assert solved.bias is not None
    torch.testing.assert_close(solved.bias.double(), expected[-1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(solved.weight.double(), expected[:-1].T, rtol=1e-3, atol=1e-3)


def test_mean_bias_is_what_the_pruned_columns_add_on_average(layer):
    solved = mean_bias(layer.weight, layer.mean, KEEP)
    pruned = [j for j in range(IN) if j not in KEEP.tolist()]
    added = torch.stack([token[pruned] @ layer.weight[:, pruned].T for token in layer.inputs])
    torch.testing.assert_close(solved.bias, added.mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(solved.weight, layer.weight[:, KEEP])


def test_each_compensation_leaves_less_than_what_it_extends(layer):
    plain = layer.loss(layer.weight[:, KEEP], KEEP)
    bias = mean_bias(layer.weight, layer.mean, KEEP)
    solved = least_squares_columns(layer.weight, layer.gram, KEEP)
    both = least_squares_with_bias(layer.weight, layer.gram, layer.mean, TOKENS, KEEP)
    losses = [layer.loss(part.weight, KEEP, part.bias) for part in (bias, solved, both)]
    assert losses[0] < 0.95 * plain
    assert losses[1] < 0.5 * plain
    assert losses[2] < min(losses[:2])


def test_centred_gram_is_that_of_centred_inputs(layer):
    centred = layer.inputs.double() - layer.inputs.double().mean(0)
    actual = centred_gram(layer.gram, layer.mean, TOKENS)
    torch.testing.assert_close(actual, centred.T @ centred, rtol=1e-4, atol=1e-2)


def test_inputs_that_repeat_each_other_raise_the_dampening():
    inputs = torch.ones(5, 4)
    solved = least_squares_columns(torch.ones(2, 4), inputs.T @ inputs, torch.tensor([0, 1, 2]), 0.0)
    assert solved.dampening > 0
    torch.testing.assert_close(inputs[:, :3] @ solved.weight.T, torch.full((5, 2), 4.0), rtol=1e-3, atol=0)
