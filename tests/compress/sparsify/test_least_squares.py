"""Conjugate gradient against the exact least squares solution of every row."""

import numpy as np
import pytest
import torch

from hf_llmkernel.compress.sparsify.least_squares import least_squares
from hf_llmkernel.compress.sparsify.mask import select_mask
from hf_llmkernel.compress.sparsify.wanda import wanda_scores

from .conftest import IN


def solve_rows(layer, mask, dampening):
    """Ridge regression towards the weight, one row after another, in fp64."""
    inputs, weight = layer.inputs.double().numpy(), layer.weight.double().numpy()
    ridge = np.sqrt(dampening * np.mean((inputs**2).sum(0))) * np.eye(IN)
    solution = np.zeros_like(weight)
    for row, kept in enumerate(mask.numpy()):
        system = np.concatenate([inputs[:, kept], ridge[:, kept]])
        target = np.concatenate([inputs @ weight[row], ridge @ weight[row]])
        solution[row, kept] = np.linalg.lstsq(system, target, rcond=None)[0]
    return solution


@pytest.fixture
def mask(layer):
    return select_mask(wanda_scores(layer.weight, layer.gram.diagonal().sqrt()), 0.5, scope="layer")


@pytest.mark.parametrize("dampening", [0.0, 0.01, 1.0])
def test_every_row_is_its_own_least_squares_solution(layer, mask, dampening):
    found = least_squares(layer.weight, layer.gram, mask, dampening, steps=100, tolerance=1e-6)
    np.testing.assert_allclose(found.numpy(), solve_rows(layer, mask, dampening), rtol=0, atol=2e-3)


def textbook_steps(weight, hessian, kept, count):
    """Preconditioned conjugate gradient for one row and its kept columns, in fp64."""
    system, solution = hessian[np.ix_(kept, kept)], weight[kept].copy()
    residual = hessian[kept] @ weight - system @ solution
    direction = scaled = residual / np.diag(system)
    for _ in range(count):
        length = (residual @ scaled) / (direction @ system @ direction)
        solution, after = solution + length * direction, residual - length * system @ direction
        scaled_after = after / np.diag(system)
        direction = scaled_after + (after @ scaled_after) / (residual @ scaled) * direction
        residual, scaled = after, scaled_after
    return solution


@pytest.mark.parametrize("count", [1, 2, 5])
def test_steps_are_those_of_preconditioned_conjugate_gradient(layer, mask, count):
    found = least_squares(layer.weight, layer.gram, mask, 0.02, count, 0.0)
    for row, kept in enumerate(mask.numpy()):
        expected = textbook_steps(layer.weight[row].double().numpy(), layer.damped_hessian(0.02), kept, count)
        np.testing.assert_allclose(found[row, kept].numpy(), expected, rtol=0, atol=1e-4)


def test_the_default_steps_come_within_a_percent_of_the_best_loss(layer, mask):
    best = layer.loss(torch.from_numpy(solve_rows(layer, mask, 0.01)))
    assert layer.loss(layer.weight * mask) > 1.5 * best
    assert layer.loss(least_squares(layer.weight, layer.gram, mask)) < 1.01 * best


def test_more_steps_lower_the_loss_and_the_tolerance_ends_them(layer, mask):
    losses = [layer.loss(least_squares(layer.weight, layer.gram, mask, 0.0, steps, 0.0)) for steps in (0, 2, 5, 15)]
    assert losses[0] == pytest.approx(layer.loss(layer.weight * mask), rel=1e-4)
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(least_squares(layer.weight, layer.gram, mask, tolerance=1.0), layer.weight * mask)


def test_it_begins_where_it_is_told_and_stays_at_the_solution(layer, mask):
    solution = torch.from_numpy(solve_rows(layer, mask, 0.01)).float()
    found = least_squares(layer.weight, layer.gram, mask, steps=1, start=solution)
    assert layer.loss(found) == pytest.approx(layer.loss(solution), rel=1e-3)
    dense = torch.ones_like(solution)  # what lies outside the mask is not taken over
    assert torch.equal(least_squares(layer.weight, layer.gram, mask, steps=0, start=dense), mask.float())


def test_nothing_outside_the_mask_and_nothing_to_do_inside(layer, mask):
    assert not least_squares(layer.weight, layer.gram, mask)[~mask].any()
    everything = torch.ones_like(mask)
    assert torch.equal(least_squares(layer.weight, layer.gram, everything), layer.weight)


def test_inputs_that_never_occur_and_rows_without_weights_do_no_harm(layer, mask):
    gram, mask = layer.gram.clone(), mask.clone()
    gram[4], gram[:, 4], mask[2] = 0, 0, False
    for dampening in (0.0, 0.01):
        found = least_squares(layer.weight, gram, mask, dampening)
        assert found.isfinite().all()
        assert not found[2].any()
        torch.testing.assert_close(found[:, 4], (layer.weight * mask)[:, 4])  # no data says otherwise


def test_arguments_are_left_as_they_were(layer, mask):
    start = layer.weight * mask
    tensors = layer.weight.clone(), layer.gram, mask, start
    before = [tensor.clone() for tensor in tensors]
    least_squares(*tensors[:3], start=start)
    assert all(torch.equal(tensor, expected) for tensor, expected in zip(tensors, before, strict=True))
