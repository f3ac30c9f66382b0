"""The loss from a Gram matrix against the loss of the outputs."""

import pytest
import torch

from hf_llmkernel.compress.sparsify.reconstruction import reconstruction_loss


def test_loss_is_the_share_of_output_energy_that_is_lost(layer):
    changed = layer.weight * (layer.weight.abs() > 0.7)
    assert reconstruction_loss(layer.weight, changed, layer.gram) == pytest.approx(layer.loss(changed), rel=1e-4)


def test_same_outputs_lose_nothing_and_none_lose_all(layer):
    assert reconstruction_loss(layer.weight, layer.weight, layer.gram) == 0
    assert reconstruction_loss(layer.weight, torch.zeros_like(layer.weight), layer.gram) == pytest.approx(1)
    assert reconstruction_loss(layer.weight, layer.weight, torch.zeros_like(layer.gram)) == 0
