"""Factors for given inputs against the paper's formula, and their loss against the one measured."""

import pytest
import torch

from hf_llmkernel.compress.factorize.svd import truncated_svd
from hf_llmkernel.compress.factorize.svd_llm import output_components, output_energies, svd_llm, svd_llm_update

SHAPES = [(12, 30), (30, 12), (16, 16)]
TOKENS, RANK = 200, 5


def layer(shape, tokens=TOKENS, seed=0):
    """Inputs that are correlated over three decades, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape[1], shape[1], generator=generator) * torch.logspace(0, -3, shape[1]).unsqueeze(1)
    inputs = torch.randn(tokens, shape[1], generator=generator) @ mixing
    return inputs, torch.randn(shape, generator=generator)


def factorize(inputs, weight, rank=RANK):
    return svd_llm(weight, output_components(weight, inputs.T @ inputs), rank)


def loss(inputs, weight, a, b):
    error = weight.double() - b.double() @ a.double()
    return (inputs.double() @ error.T).square().sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_predicted_loss_is_the_measured_one(shape):
    inputs, weight = layer(shape)
    (a, b), predicted = factorize(inputs, weight)
    assert (a.shape, b.shape) == ((RANK, shape[1]), (shape[0], RANK))
    gram = (inputs.T @ inputs).double()
    error = weight.double() - b.double() @ a.double()
    assert predicted == pytest.approx(float((error @ gram @ error.T).trace()), rel=1e-5)
    assert predicted == pytest.approx(float(loss(inputs, weight, a, b)), rel=1e-3)  # a Gram matrix is summed in fp32


@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_papers_whitening(shape):
    inputs, weight = layer(shape)
    whitening = torch.linalg.cholesky(inputs.double().T @ inputs.double())
    u, sigma, vt = torch.linalg.svd(weight.double() @ whitening, full_matrices=False)
    unwhitened = torch.linalg.solve(whitening, vt[:RANK], left=False)
    (a, b), predicted = factorize(inputs, weight)
    expected = u[:, :RANK] * sigma[:RANK] @ unwhitened
    torch.testing.assert_close((b @ a).double(), expected, rtol=1e-3, atol=1e-3)
    assert predicted == pytest.approx(float(sigma[RANK:].square().sum()), rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_energies_are_the_squared_singular_values_of_the_outputs(shape):
    inputs, weight = layer(shape)
    expected = torch.linalg.svdvals(inputs.double() @ weight.double().T).square()[: min(shape)]
    gram = inputs.T @ inputs
    components = output_components(weight, gram)
    floor = 1e-6 * float(expected[0])  # of fp32 Gram matrices
    torch.testing.assert_close(components.energies, expected, rtol=1e-4, atol=floor)
    torch.testing.assert_close(output_energies(weight, gram), components.energies, rtol=1e-9, atol=1e-9 * floor)
    identity = torch.eye(min(shape), dtype=torch.float64)
    torch.testing.assert_close(components.basis.T @ components.basis, identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_white_inputs_give_the_plain_decomposition(shape):
    _, weight = layer(shape)
    (a, b), _ = svd_llm(weight, output_components(weight, torch.eye(shape[1])), RANK)
    plain = truncated_svd(weight, RANK)
    torch.testing.assert_close(b @ a, plain.b @ plain.a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.norm(dim=1), plain.a.norm(dim=1), rtol=1e-4, atol=0)


def test_rows_and_columns_are_in_balance_whatever_the_tokens():
    inputs, weight = layer((12, 30))
    (a, b), _ = factorize(inputs, weight)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-5, atol=0)
    (more, _), _ = factorize(inputs.repeat(64, 1), weight)
    torch.testing.assert_close(more.abs(), a.abs(), rtol=1e-3, atol=1e-3)


def test_correlated_inputs_lose_less_than_by_the_weight_alone():
    inputs, weight = layer((16, 16))
    (a, b), _ = factorize(inputs, weight)
    plain = truncated_svd(weight, RANK)
    assert loss(inputs, weight, a, b) < 0.2 * loss(inputs, weight, *plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_tokens_than_the_rank_lose_nothing(shape):
    inputs, weight = layer(shape, tokens=3)
    (a, b), predicted = factorize(inputs, weight)
    assert a.isfinite().all() and b.isfinite().all()
    assert predicted <= 1e-5 * loss(inputs, weight, 0 * a, b)
    torch.testing.assert_close(inputs @ a.T @ b.T, inputs @ weight.T, rtol=1e-3, atol=1e-3)


def test_outputs_that_are_zero_give_finite_factors():
    weight = torch.zeros(4, 6)
    weight[0, 0] = 1
    (a, b), predicted = svd_llm(weight, output_components(weight, torch.eye(6)), 3)
    assert predicted == 0
    torch.testing.assert_close(b @ a, weight)


def test_update_solves_the_least_squares_problem_on_other_inputs():
    inputs, weight = layer((12, 30))
    (a, _), _ = factorize(inputs, weight)
    moved = inputs + 0.3 * layer((12, 30), seed=1)[0]
    b, used = svd_llm_update(weight, a, moved.T @ moved, dampening=0)
    reduced = moved.double() @ a.double().T
    expected = torch.linalg.lstsq(reduced, moved.double() @ weight.double().T).solution.T
    assert used == 0
    torch.testing.assert_close(b.double(), expected, rtol=1e-3, atol=1e-4)


def test_update_is_damped_by_the_mean_of_the_diagonal():
    inputs, weight = layer((12, 30))
    (a, _), _ = factorize(inputs, weight)
    reduced = inputs.double() @ a.double().T
    hold = (0.1 * reduced.square().sum() / RANK).sqrt() * torch.eye(RANK, dtype=torch.float64)
    targets = torch.cat([inputs.double() @ weight.double().T, torch.zeros(RANK, 12, dtype=torch.float64)])
    expected = torch.linalg.lstsq(torch.cat([reduced, hold]), targets).solution.T
    b, _ = svd_llm_update(weight, a, inputs.T @ inputs, dampening=0.1)
    torch.testing.assert_close(b.double(), expected, rtol=1e-3, atol=1e-4)


def test_update_on_the_same_inputs_changes_nothing():
    inputs, weight = layer((12, 30))
    (a, b), _ = factorize(inputs, weight)
    updated, _ = svd_llm_update(weight, a, inputs.T @ inputs, dampening=0)
    torch.testing.assert_close(updated, b, rtol=1e-3, atol=1e-4)
