"""Grids against the range of every group, and the search against all candidates one group at a time."""

import numpy as np
import pytest
import torch

from hf_llmkernel.compress.quantize.grid import SHRINKS, chosen, code_range, grid_of, group_sums
from hf_llmkernel.model.configuration_llm_kernel import LinearForm

from ..sparsify.conftest import IN, OUT
from .conftest import FLOATING_ZEROS, GROUP, INTEGER_ZEROS, SYMMETRIC, naive_range_grid, naive_round


def groups(row, form):
    size = form.group_size or len(row)
    return [row[begin : begin + size] for begin in range(0, len(row), size)]


def test_by_default_a_grid_spans_its_group(layer, form):
    grid = grid_of(layer.weight, form)
    found = grid.nearest(layer.weight)
    for row in range(OUT):
        expected = []
        for values in groups(layer.weight[row].tolist(), form):
            scale, zero = naive_range_grid(values, form)
            expected += [naive_round(value, scale, zero, form) for value in values]
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-6)


def test_columns_round_as_the_whole_does(layer, form):
    grid = grid_of(layer.weight, form)
    columns = grid.columns(IN)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(2))
    expected = grid.nearest(layer.weight)
    for position, column in enumerate(order.tolist()):
        found = columns.reordered(order).nearest(position, layer.weight[:, column])
        torch.testing.assert_close(found, expected[:, column], rtol=1e-5, atol=1e-6)


def test_the_search_takes_the_least_error_of_every_group(layer):
    importance = layer.gram.diagonal()
    found = grid_of(layer.weight, SYMMETRIC, importance).nearest(layer.weight)
    for row in range(OUT):
        for begin in range(0, IN, GROUP):
            values, costs = layer.weight[row, begin : begin + GROUP].tolist(), importance[begin : begin + GROUP]
            errors = []
            for shrink in SHRINKS:
                scale, _ = naive_range_grid([value * shrink for value in values], SYMMETRIC)
                for signed in (scale, -scale):
                    rounded = [naive_round(value, signed, 0.0, SYMMETRIC) for value in values]
                    errors.append(float((torch.tensor(rounded) - torch.tensor(values)).square() @ costs))
            error = (found[row, begin : begin + GROUP] - layer.weight[row, begin : begin + GROUP]).square() @ costs
            assert float(error) == pytest.approx(min(errors), rel=1e-5)


@pytest.mark.parametrize("form", [INTEGER_ZEROS, FLOATING_ZEROS])
def test_the_search_lowers_the_error_of_asymmetric_grids(layer, form):
    plain, searched = grid_of(layer.weight, form), grid_of(layer.weight, form, torch.ones(IN))
    errors = [(grid.nearest(layer.weight) - layer.weight).square().sum() for grid in (plain, searched)]
    assert errors[1] < 0.97 * errors[0]


def test_the_better_of_two_grids_is_taken_group_by_group(layer, form):
    first, second = grid_of(layer.weight, form), grid_of(2 * layer.weight, form)
    where = torch.rand(first.scales.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    mixed = chosen(where, first, second)
    assert torch.equal(mixed.scales, torch.where(where, first.scales, second.scales))
    assert mixed.scales.dtype == first.scales.dtype
    assert (mixed.zero_points is None) == form.symmetric


def test_sums_of_groups_take_a_short_last_one():
    sums = group_sums(torch.arange(7.0).expand(2, 7), 3)
    assert sums.tolist() == [[3.0, 12.0, 6.0]] * 2
    assert group_sums(torch.arange(7.0).expand(2, 7), None).tolist() == [[21.0]] * 2


def test_groups_of_zeros_and_every_range_of_codes():
    weight = torch.zeros(2, 8)
    weight[1, 4:] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    form = LinearForm(bits=4, group_size=4)
    found = grid_of(weight, form, torch.ones(8)).nearest(weight)
    assert not found[0].any() and found[1, 7] == pytest.approx(-4.0, rel=0.1)
    ranges = [code_range(LinearForm(bits=bits, symmetric=symmetric)) for bits in (4, 8) for symmetric in (True, False)]
    assert ranges == [(-8, 7), (0, 15), (-127, 127), (0, 255)]


def test_a_range_beyond_the_scales_is_refused():
    with pytest.raises(ValueError, match="scale_dtype='float16': cannot hold a scale of"):
        grid_of(torch.full((1, 8), 1e6), LinearForm(bits=4, group_size=4))
