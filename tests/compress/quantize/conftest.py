"""A linear over inputs that are correlated and of very different sizes, a mask, and grids one value at a time."""

import numpy as np
import pytest
import torch

from hf_llmkernel.model.configuration_llm_kernel import LinearForm

from ..sparsify.conftest import IN, OUT, layer

__all__ = ["layer"]  # the fixture: the layer of the sparsification tests

GROUP = 12
SYMMETRIC = LinearForm(bits=4, group_size=GROUP)
INTEGER_ZEROS = LinearForm(bits=4, group_size=GROUP, symmetric=False)
FLOATING_ZEROS = LinearForm(
    bits=4, group_size=GROUP, symmetric=False, zero_point_dtype="float32", scale_dtype="float32"
)
EIGHT_BITS = LinearForm(bits=8, group_size=10)  # which does not divide the 36 columns
FORMS = {"symmetric": SYMMETRIC, "zeros": INTEGER_ZEROS, "floating zeros": FLOATING_ZEROS, "8 bits": EIGHT_BITS}


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def form(request):
    return request.param


@pytest.fixture
def mask():
    """bool `[OUT, IN]`, half of it true."""
    return torch.rand(OUT, IN, generator=torch.Generator().manual_seed(1)) < 0.5


def naive_range_grid(values, form):
    """Scale and zero of a group that spans all its values and zero, as they are stored."""
    low, high = min(0.0, *values), max(0.0, *values)
    if form.symmetric:
        scale, zero = max(-low, high) / (2 ** (form.bits - 1) - 1), 0.0
    else:
        scale = (high - low) / (2**form.bits - 1)
    scale = float(torch.tensor(scale).to(getattr(torch, form.scale_dtype)))
    if not form.symmetric:
        zero = -low / scale
        zero = float(round(zero)) if form.zero_point_dtype == "uint8" else zero
    return scale, zero


def naive_round(value, scale, zero, form):
    """The nearest value on a grid."""
    low, high = (0, 2**form.bits - 1) if not form.symmetric else {4: (-8, 7), 8: (-127, 127)}[form.bits]
    return (float(np.clip(np.rint(value / scale + zero), low, high)) - zero) * scale
