"""Factors of Gram matrices against what they multiply to, and the dampening that a singular one gets."""

import pytest
import torch

from hf_llmkernel.compress.solve import damped_cholesky, damped_inverse_cholesky, triangular_inverse

IN = 40


@pytest.fixture
def gram():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(90, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    return inputs.T @ inputs


def damped(gram, dampening):
    return gram.double() + dampening * gram.double().diagonal().mean() * torch.eye(IN, dtype=torch.float64)


@pytest.mark.parametrize("dampening", [0.0, 0.01, 3.0])
def test_factor_multiplies_to_the_damped_gram(gram, dampening):
    before = gram.clone()
    factor, used = damped_cholesky(gram, dampening)
    assert used == dampening
    assert factor.dtype == torch.float64
    torch.testing.assert_close(factor @ factor.T, damped(gram, dampening), rtol=1e-12, atol=1e-9)
    assert factor.triu(1).count_nonzero() == 0
    assert torch.equal(gram, before)


def test_a_double_gram_is_left_as_it_was(gram):
    gram = gram.double()
    before = gram.clone()
    damped_cholesky(gram, 0.5)
    assert torch.equal(gram, before)


def test_inverse_factor_multiplies_to_the_inverse(gram):
    upper, used = damped_inverse_cholesky(gram, 0.01)
    assert used == 0.01
    assert upper.tril(-1).count_nonzero() == 0
    assert (upper.diagonal() > 0).all()
    identity = torch.eye(IN, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper @ damped(gram, 0.01), identity, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [1, 128, 129, 301])
def test_triangular_inverse_in_one_piece_and_by_halves(size):
    lower = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).tril() / size
    lower.diagonal().copy_(torch.linspace(1, 2, size))
    inverse = triangular_inverse(lower)
    assert inverse.triu(1).count_nonzero() == 0
    torch.testing.assert_close(inverse @ lower, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dampening", "expected"), [(0.0, 1e-2), (1e-5, 1e-2), (0.002, 0.02)])
def test_an_indefinite_gram_raises_the_dampening_tenfold_until_it_works(dampening, expected):
    gram = torch.eye(IN)
    gram[0, 0] = -0.005  # definite from λ ≈ 0.0051 on
    factor, used = damped_cholesky(gram, dampening)
    assert used == pytest.approx(expected)
    torch.testing.assert_close(factor @ factor.T, damped(gram, used), rtol=1e-12, atol=1e-12)


def test_fewer_tokens_than_inputs_is_survived():
    inputs = torch.randn(8, IN, generator=torch.Generator().manual_seed(1))
    _, used = damped_cholesky(inputs.T @ inputs, 0.0)
    assert 0 < used <= 1e-5


def test_one_is_the_last_dampening_tried():
    gram = torch.eye(IN)
    gram[0, 0] = -0.5  # definite from λ ≈ 0.52 on
    assert damped_cholesky(gram, 0.01)[1] == pytest.approx(1.0)
    gram[0, 0] = -20.0
    with pytest.raises(ValueError, match="dampening=0.01: .*not positive definite, not even at 1;"):
        damped_cholesky(gram, 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gram_that_is_not_finite_is_refused(gram, value):
    gram[3, 5] = value
    with pytest.raises(ValueError, match="gram: .*not finite"):
        damped_cholesky(gram, 0.01)


@pytest.mark.parametrize("dampening", [-0.1, float("nan"), float("inf")])
def test_dampening_outside_its_range_is_refused(gram, dampening):
    with pytest.raises(ValueError, match="dampening="):
        damped_cholesky(gram, dampening)


def test_inputs_that_are_all_zero_have_a_factor_whatever_the_dampening():
    for dampening in (0.0, 0.01, 0.1):
        factor, used = damped_cholesky(torch.zeros(4, 4), dampening)
        assert used > 0 and torch.allclose(factor @ factor.T, used * torch.eye(4).double())
