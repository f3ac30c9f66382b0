"""The truncated decomposition against the spectral theorem."""

import pytest
import torch

from hf_llmkernel.compress.factorize.svd import truncated_svd


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_the_error_is_the_singular_values_left_out(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b = truncated_svd(weight, 5)
    assert (a.shape, b.shape) == ((5, shape[1]), (shape[0], 5))
    # squared singular values, from the eigenvalues of the other product
    energies = torch.linalg.eigvalsh((weight.T @ weight).double()).flip(0)
    left_out = energies[5 : min(shape)].sum()
    torch.testing.assert_close((weight - b @ a).double().square().sum(), left_out, rtol=1e-5, atol=0)
    torch.testing.assert_close(a.norm(dim=1).double(), energies[:5] ** 0.25, rtol=1e-5, atol=0)
    torch.testing.assert_close(b.norm(dim=0).double(), energies[:5] ** 0.25, rtol=1e-5, atol=0)


def test_a_weight_of_low_rank_comes_back():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 4, generator=generator) @ torch.randn(4, 15, generator=generator)
    a, b = truncated_svd(weight.bfloat16().float(), 15)
    torch.testing.assert_close(b @ a, weight.bfloat16().float(), rtol=1e-4, atol=1e-4)
    a, b = truncated_svd(weight, 4)
    torch.testing.assert_close(b @ a, weight, rtol=1e-4, atol=1e-4)
