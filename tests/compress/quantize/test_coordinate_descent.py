"""Coordinate descent against one coordinate at a time in fp64, refitted grids against least squares of every row."""

import numpy as np
import pytest
import torch

from hf_llmkernel.compress.quantize import coordinate_descent as descent_file
from hf_llmkernel.compress.quantize.coordinate_descent import coordinate_descent, descend, refit_grid
from hf_llmkernel.compress.quantize.gptq import gptq
from hf_llmkernel.compress.quantize.grid import grid_of
from hf_llmkernel.model.linear_llm_kernel import expand_groups

from ..sparsify.conftest import IN, OUT
from .conftest import FLOATING_ZEROS, GROUP, INTEGER_ZEROS, SYMMETRIC, naive_round


def start(layer, form, kept):
    weight = layer.weight * kept
    grid = grid_of(weight, form)
    return weight, grid.nearest(weight) * kept, grid


@pytest.mark.parametrize("block", [8, 128])
def test_every_column_becomes_the_best_on_its_grid(layer, form, mask, block, monkeypatch):
    monkeypatch.setattr(descent_file, "BLOCK", block)
    weight, rounded, grid = start(layer, form, mask)
    hessian = layer.damped_hessian(0.01)
    scales = expand_groups(grid.scales, IN, form.group_size).double().numpy()
    zeros = np.zeros_like(scales)
    if grid.zero_points is not None:
        zeros = expand_groups(grid.zero_points, IN, form.group_size).double().numpy()
    expected, exact = rounded.double().numpy().copy(), weight.double().numpy()
    for row in range(OUT):
        for column in range(IN):
            if mask[row, column]:
                push = (exact[row] - expected[row]) @ hessian[column] / hessian[column, column]
                best = naive_round(expected[row, column] + push, scales[row, column], zeros[row, column], form)
                expected[row, column] = best
    found = descend(weight, rounded, grid, torch.tensor(hessian).float(), mask)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def row_least_squares(weight, bases, hessian):
    """Weighted least squares in fp64: the factors of some vectors whose sum is nearest to a row under H."""
    root = np.linalg.cholesky(hessian).T
    return np.linalg.lstsq(root @ np.stack(bases, 1), root @ weight, rcond=None)[0]


def members(form, begin):
    inside = np.zeros(IN)
    inside[begin : begin + form.group_size] = 1
    return inside


@pytest.mark.parametrize("form", [SYMMETRIC, INTEGER_ZEROS, FLOATING_ZEROS], ids=["symmetric", "zeros", "floating"])
def test_a_refitted_grid_is_the_least_squares_of_its_codes(layer, form, mask):
    if form is FLOATING_ZEROS:  # with few weights in a group a scale and a shift can hardly be told apart
        mask = torch.ones_like(mask)
    weight, rounded, grid = start(layer, form, mask)
    hessian = layer.damped_hessian(0.01)
    scales = expand_groups(grid.scales, IN, form.group_size).double().numpy()
    centred = rounded.double().numpy() / scales
    found, refitted = refit_grid(weight, rounded, grid, torch.tensor(hessian).float(), mask)
    begins = range(0, IN, form.group_size)
    for row in range(OUT):
        bases = [centred[row] * members(form, begin) for begin in begins]
        if form is FLOATING_ZEROS:
            bases += [mask[row].double().numpy() * members(form, begin) for begin in begins]
        factors = row_least_squares(weight[row].double().numpy(), bases, hessian)
        expected = sum(factor * base for factor, base in zip(factors, bases, strict=True))
        tolerance = 1e-5 if form is FLOATING_ZEROS else 1e-3  # of what fp16 scales can hold
        np.testing.assert_allclose(found[row], expected, rtol=tolerance, atol=tolerance)
    nearest = refitted.nearest(found) * mask
    torch.testing.assert_close(nearest, found, rtol=1e-5, atol=1e-5)


def test_neither_step_ever_raises_the_loss(layer, form, mask):
    weight, rounded, grid = start(layer, form, mask)
    hessian = torch.tensor(layer.damped_hessian(0.01)).float()

    def losses(found):
        return ((weight - found) @ hessian * (weight - found)).sum(1)

    before = losses(rounded)
    for _ in range(3):
        rounded, grid = refit_grid(weight, rounded, grid, hessian, mask)
        assert (losses(rounded) <= before * (1 + 1e-5)).all() and not rounded[~mask].any()
        before = losses(rounded)
        rounded = descend(weight, rounded, grid, hessian, mask)
        assert (losses(rounded) <= before * (1 + 1e-5)).all()
        before = losses(rounded)
    assert not rounded[~mask].any()


def test_a_row_that_a_refit_would_harm_keeps_its_grid(layer, mask, monkeypatch):
    weight, rounded, grid = start(layer, SYMMETRIC, mask)

    def doubled(*given):
        factors = 1.0 * grid.scales.float()
        factors[:3] *= 2
        return [factors]

    monkeypatch.setattr(descent_file, "_least_squares", doubled)
    found, kept = refit_grid(weight, rounded, grid, layer.gram, mask)
    assert torch.equal(found, rounded) and torch.equal(kept.scales, grid.scales)


@pytest.mark.parametrize("masked", [False, True])
def test_losses_fall_from_nearest_to_gptq_to_descent(layer, form, mask, masked):
    kept = mask if masked else torch.ones_like(mask)
    weight = layer.weight * kept

    def loss(found):
        return float(((found - weight) @ layer.gram * (found - weight)).sum())

    made = coordinate_descent(weight, layer.gram, form, kept if masked else None)
    nearest = loss(grid_of(weight, form).nearest(weight) * kept)
    compensated = loss(gptq(weight, layer.gram, form, kept if masked else None).weight)
    assert loss(made.weight) < 0.9 * compensated < 0.9 * nearest
    assert not made.weight[~kept].any()
    torch.testing.assert_close(made.grid.nearest(made.weight) * kept, made.weight, rtol=1e-5, atol=1e-5)


def test_what_a_grid_can_hold_exactly_comes_back(layer):
    codes = torch.randint(0, 16, (OUT, IN), generator=torch.Generator().manual_seed(4))
    codes[:, ::GROUP], codes[:, 1::GROUP] = 0, 15
    weight = (codes - 7.25) * 0.125
    made = coordinate_descent(weight, layer.gram, FLOATING_ZEROS)
    torch.testing.assert_close(made.weight, weight, rtol=1e-4, atol=1e-4)


def test_rows_and_inputs_of_zeros_stay(layer):
    weight, inputs = layer.weight.clone(), layer.inputs.clone()
    weight[3] = 0
    inputs[:, 7] = 0
    made = coordinate_descent(weight, inputs.T @ inputs, SYMMETRIC)
    assert not made.weight[3].any() and made.weight.isfinite().all() and made.grid.scales.isfinite().all()
