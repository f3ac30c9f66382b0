"""HQQ against its half-quadratic steps written out group by group."""

import numpy as np
import pytest
import torch

from hf_llmkernel.compress.quantize.grid import grid_of
from hf_llmkernel.compress.quantize.hqq import hqq, shrink
from hf_llmkernel.model.configuration_llm_kernel import LinearForm

from ..sparsify.conftest import IN, OUT
from .conftest import FLOATING_ZEROS, GROUP

EIGHT = LinearForm(bits=8, group_size=9, symmetric=False, zero_point_dtype="float32", scale_dtype="float32")


def naive(weight, kept, form):
    """At most 20 steps in fp64, which end where errors grow, and the weight rounded on the zero points before that."""
    size, top = form.group_size, 2**form.bits - 1
    weight = weight.double().numpy()
    groups = [(row, slice(begin, begin + size)) for row in range(OUT) for begin in range(0, IN, size)]
    scale, zero = {}, {}
    for key in groups:
        low, high = min(0.0, weight[key].min()), max(0.0, weight[key].max())
        scale[key[0], key[1].start] = (high - low) / top
        zero[key[0], key[1].start] = -low / ((high - low) / top)
    beta, least, best = 10.0, np.inf, zero
    for _ in range(20):
        errors, wanted = [], {}
        for row, span in groups:
            step, point, own = scale[row, span.start], zero[row, span.start], kept[row, span]
            codes = np.clip(np.rint(weight[row, span] / step + point), 0, top)
            error = (weight[row, span] - (codes - point) * step)[own]
            errors += np.abs(error).tolist()
            sizes = np.abs(error)
            sparse = np.sign(error) * np.maximum(sizes - np.maximum(sizes, 1e-30) ** -0.3 / beta, 0)
            if own.any():
                wanted[row, span.start] = np.mean(codes[own] - (weight[row, span][own] - sparse) / step)
        if np.mean(errors) >= least:
            break
        least, best, zero, beta = np.mean(errors), zero, {**zero, **wanted}, beta * 1.01
    rounded = np.zeros_like(weight)
    for row, span in groups:
        step, point = scale[row, span.start], best[row, span.start]
        rounded[row, span] = (np.clip(np.rint(weight[row, span] / step + point), 0, top) - point) * step
    return rounded * kept


@pytest.mark.parametrize("form", [FLOATING_ZEROS, EIGHT], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("masked", [False, True])
def test_steps_are_those_of_the_paper(layer, mask, form, masked):
    kept = mask if masked else torch.ones_like(mask)
    weight = layer.weight * kept
    found = hqq(weight, form, mask if masked else None)
    np.testing.assert_allclose(found.weight.numpy(), naive(weight, kept.numpy(), form), rtol=1e-5, atol=1e-5)
    assert not found.weight[~kept].any()


def test_zero_points_off_the_range_err_less(layer):
    outlying = layer.weight.clone()
    outlying[:, ::GROUP] *= 4
    before = grid_of(outlying, FLOATING_ZEROS).nearest(outlying) - outlying
    after = hqq(outlying, FLOATING_ZEROS).weight - outlying
    assert after.abs().sum() < 0.99 * before.abs().sum()


def test_small_errors_shrink_to_nothing():
    error = torch.tensor([-2.0, -0.1, 0.0, 0.1, 2.0])
    kept = 2 - 2**-0.3 / 10
    torch.testing.assert_close(shrink(error, 10.0), torch.tensor([-kept, 0.0, 0.0, 0.0, kept]))
