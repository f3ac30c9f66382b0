"""Weight norms against loops, and their invariance."""

import math

import pytest
import torch

from hf_llmkernel.compress.prune.magnitude import magnitude_scores


@pytest.fixture
def neurons():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((6, 9), (9, 6), (9, 6))]


def test_a_score_is_the_product_of_the_norms_of_a_neuron(neurons):
    down, gate, up = (weight.tolist() for weight in neurons)
    expected = [
        math.hypot(*(row[j] for row in down)) * math.hypot(*gate[j]) * math.hypot(*up[j]) for j in range(len(gate))
    ]
    torch.testing.assert_close(magnitude_scores(*neurons), torch.tensor(expected), rtol=1e-5, atol=0)


def test_scaling_up_and_undoing_it_in_down_changes_no_score(neurons):
    down, gate, up = neurons
    factors = torch.logspace(-3, 3, len(up))
    moved = magnitude_scores(down / factors, gate, up * factors.unsqueeze(1))
    torch.testing.assert_close(moved, magnitude_scores(down, gate, up), rtol=1e-5, atol=0)


def test_norms_of_bfloat16_weights_are_taken_in_fp32(neurons):
    rounded = [weight.bfloat16() for weight in neurons]
    assert torch.equal(magnitude_scores(*rounded), magnitude_scores(*(weight.float() for weight in rounded)))
