"""GPTQ against the optimal brain surgeon's own recursion, every inverse computed anew, in fp64."""

import numpy as np
import pytest
import torch

from hf_llmkernel.compress.quantize import gptq as gptq_file
from hf_llmkernel.compress.quantize.gptq import gptq
from hf_llmkernel.compress.quantize.grid import grid_of
from hf_llmkernel.model.configuration_llm_kernel import LinearForm

from ..sparsify.conftest import IN, OUT
from .conftest import FLOATING_ZEROS, SYMMETRIC, naive_range_grid, naive_round


def surgeon(weight, hessian, kept, form, order, static):
    """Rounds column after column; those to come move by the optimal change for the error of each."""
    weight = weight.double().numpy().copy()
    original, size = weight.copy(), form.group_size or IN
    grids = {}
    for position, column in enumerate(order):
        rest = order[position:]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        for row in range(OUT):
            group = column // size
            members = slice(group * size, (group + 1) * size)
            if (row, group) not in grids:
                source = original if static else weight
                values = (source[row, members] * kept[row, members]).tolist()
                grids[row, group] = naive_range_grid(values, form)
            rounded = naive_round(weight[row, column], *grids[row, group], form) if kept[row, column] else 0.0
            weight[row, rest] -= (weight[row, column] - rounded) / inverse[0, 0] * inverse[0]
            weight[row, column] = rounded
    return weight


def close(found, expected):
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [8, 128])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_every_column_makes_up_for_those_before_it(layer, form, mask, masked, static, block, monkeypatch):
    monkeypatch.setattr(gptq_file, "BLOCK", block)
    kept = mask if masked else torch.ones_like(mask)
    weight = layer.weight * kept
    expected = surgeon(weight, layer.damped_hessian(0.01), kept.numpy(), form, np.arange(IN), static)
    found = gptq(weight, layer.gram, form, mask if masked else None, static_groups=static)
    close(found.weight, expected)
    assert not found.weight[~kept].any()
    assert found.dampening == 0.01


def test_columns_in_the_order_of_their_energy(layer, form, mask):
    order = np.argsort(-layer.gram.diagonal().numpy(), kind="stable")
    weight = layer.weight * mask
    expected = surgeon(weight, layer.damped_hessian(0.1), mask.numpy(), form, order, True)
    close(gptq(weight, layer.gram, form, mask, act_order=True, dampening=0.1).weight, expected)


def test_one_scale_a_row(layer):
    form = LinearForm(bits=4)
    expected = surgeon(layer.weight, layer.damped_hessian(0.01), np.ones((OUT, IN)), form, np.arange(IN), False)
    close(gptq(layer.weight, layer.gram, form).weight, expected)


def test_what_is_made_lies_on_the_grid(layer, form):
    for settings in ({}, {"act_order": True}, {"scale_search": True}):
        made = gptq(layer.weight, layer.gram, form, **settings)
        torch.testing.assert_close(made.grid.nearest(made.weight), made.weight, rtol=1e-5, atol=1e-6)
        assert made.grid.scales.shape == (OUT, -(-IN // form.group_size))
        assert made.grid.scales.dtype == getattr(torch, form.scale_dtype)


def test_losses_fall_as_more_is_known(layer):
    nearest = layer.loss(grid_of(layer.weight, SYMMETRIC).nearest(layer.weight))
    plain = layer.loss(gptq(layer.weight, layer.gram, SYMMETRIC).weight)
    searched = layer.loss(gptq(layer.weight, layer.gram, SYMMETRIC, scale_search=True).weight)
    assert searched < plain < nearest


def test_errors_do_not_flow_into_pruned_weights(layer, mask):
    weight = layer.weight * mask
    aware = gptq(weight, layer.gram, SYMMETRIC, mask)
    unaware = gptq(weight, layer.gram, SYMMETRIC).weight * mask
    assert not aware.weight[~mask].any()
    changed = [float(((w - weight) @ layer.gram * (w - weight)).sum()) for w in (aware.weight, unaware)]
    assert changed[0] < changed[1]


def test_inputs_that_never_occur_are_rounded_to_nearest(layer):
    inputs = layer.inputs.clone()
    inputs[:, 5:12] = 0
    made = gptq(layer.weight, inputs.T @ inputs, FLOATING_ZEROS, static_groups=True)
    expected = grid_of(layer.weight, FLOATING_ZEROS).nearest(layer.weight)
    torch.testing.assert_close(made.weight[:, 5:12], expected[:, 5:12])


def test_inputs_are_left_as_they_were_and_any_dtype_is_taken(layer):
    weight, gram = layer.weight.bfloat16(), layer.gram
    before = weight.clone(), gram.clone()
    assert gptq(weight, gram, SYMMETRIC, act_order=True, scale_search=True).weight.dtype == torch.float32
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


def test_faults_are_named_and_raised_dampening_is_told(layer):
    gram = torch.eye(IN)
    gram[0, 0] = -0.05
    assert gptq(layer.weight, gram, SYMMETRIC, dampening=0.02).dampening == pytest.approx(0.2)
    with pytest.raises(ValueError, match="gram: .*not finite"):
        gptq(layer.weight, layer.gram * float("inf"), SYMMETRIC)
