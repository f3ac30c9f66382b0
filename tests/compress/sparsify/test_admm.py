"""ADMM step by step against the paper's formulas, and what it reaches against SparseGPT and least squares."""

import numpy as np
import pytest
import torch

from hf_llmkernel.compress.sparsify.admm import admm, alternate
from hf_llmkernel.compress.sparsify.mask import kept_per_row, select_mask
from hf_llmkernel.compress.sparsify.sparsegpt import sparsegpt
from hf_llmkernel.compress.sparsify.wanda import wanda_scores

from .conftest import IN, OUT

CASES = [(0.5, "unstructured"), (None, "2:4"), (0.7, "unstructured")]


def by_the_paper(weight, sparse, kept, hessian, rho, steps, kept_of_row):
    """`V = (W H + ρ(Z − U))(H + ρI)⁻¹`, Z = the largest of V + U, `U += V − Z`, in fp64."""
    weight, sparse, kept, hessian = (tensor.double().numpy() for tensor in (weight, sparse, kept, hessian))
    inverse = np.linalg.inv(hessian + rho * np.eye(IN))
    dual = (weight - sparse) @ hessian / rho * (1 - kept)
    for _ in range(steps):
        dense = (weight @ hessian + rho * (sparse - dual)) @ inverse
        if kept_of_row is not None:
            sizes = np.abs(dense + dual)
            kept = sizes >= np.sort(sizes, axis=1)[:, [-kept_of_row]]
        sparse = (dense + dual) * kept
        dual = dual + dense - sparse
    return sparse, kept


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("rho", [0.5, 2.0])
def test_steps_are_the_papers(layer, rho, search):
    hessian = layer.gram / layer.gram.diagonal().mean() + 0.1 * torch.eye(IN)
    kept = select_mask(wanda_scores(layer.weight, layer.gram.diagonal().sqrt()), 0.5)
    choose = (lambda sizes: select_mask(sizes, 0.5)) if search else None
    found, mask = alternate(layer.weight, layer.weight * kept, kept, hessian, rho, 6, choose)
    expected, expected_mask = by_the_paper(
        layer.weight, layer.weight * kept, kept, hessian, rho, 6, kept_per_row(IN, 0.5) if search else None
    )
    assert np.array_equal(mask.numpy(), expected_mask)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)
    assert torch.equal(mask, kept) is not search


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize(("sparsity", "pattern"), CASES)
def test_it_loses_less_than_sparsegpt(layer, sparsity, pattern, scope):
    found = admm(layer.weight, layer.gram, sparsity=sparsity, pattern=pattern, scope=scope)
    assert layer.loss(found.weight) < 0.75 * layer.loss(sparsegpt(layer.weight, layer.gram, sparsity, pattern).weight)


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize(("sparsity", "pattern"), CASES)
def test_counts_are_exact(layer, sparsity, pattern, scope):
    found = admm(layer.weight, layer.gram, sparsity=sparsity, pattern=pattern, scope=scope)
    kept = kept_per_row(IN, sparsity or 0.5)
    assert int(found.mask.sum()) == OUT * kept
    if scope == "row":
        assert (found.mask.sum(1) == kept).all()
    if pattern == "2:4":
        assert (found.mask.view(OUT, -1, 4).sum(-1) == 2).all()
    assert not found.weight[~found.mask].any()
    assert found.weight.dtype == torch.float32


def test_a_given_mask_is_kept_and_its_best_weights_are_found(layer):
    mask = select_mask(wanda_scores(layer.weight, layer.gram.diagonal().sqrt()), 0.5)
    found = admm(layer.weight, layer.gram, mask)
    assert torch.equal(found.mask, mask)
    assert not found.weight[~mask].any()
    inputs, weight = layer.inputs.double().numpy(), layer.weight.double().numpy()
    best = np.zeros_like(weight)
    for row, kept in enumerate(mask.numpy()):
        best[row, kept] = np.linalg.lstsq(inputs[:, kept], inputs @ weight[row], rcond=None)[0]
    assert layer.loss(found.weight) < 1.1 * layer.loss(torch.from_numpy(best))
    assert layer.loss(found.weight) < 0.75 * layer.loss(sparsegpt(layer.weight, layer.gram, mask=mask).weight)


@pytest.mark.parametrize(("steps", "polish"), [(8, 0), (0, 4), (8, 4)])
def test_dampening_draws_every_part_towards_the_weight(layer, steps, polish):
    mask = select_mask(wanda_scores(layer.weight, layer.gram.diagonal().sqrt()), 0.5)
    found = admm(layer.weight, layer.gram, mask, dampening=1000.0, steps=steps, polish=polish)
    torch.testing.assert_close(found.weight, layer.weight * mask, rtol=0, atol=0.05)


def test_every_part_lowers_the_loss(layer):
    losses = [
        layer.loss(admm(layer.weight, layer.gram, sparsity=0.5, steps=steps, polish=polish).weight)
        for steps, polish in ((0, 0), (0, 4), (8, 0), (8, 4))
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(("sparsity", "pattern"), CASES)
def test_the_size_of_an_input_does_not_matter(layer, sparsity, pattern):
    sizes = 2.0 ** torch.randint(-6, 7, (IN,), generator=torch.Generator().manual_seed(1))  # exact in fp32
    found = admm(layer.weight, layer.gram, sparsity=sparsity, pattern=pattern)
    resized = admm(layer.weight / sizes, layer.gram * sizes * sizes[:, None], sparsity=sparsity, pattern=pattern)
    assert torch.equal(resized.mask, found.mask)
    torch.testing.assert_close(resized.weight * sizes, found.weight, rtol=1e-4, atol=1e-5)


def test_inputs_that_never_occur_lose_their_weights(layer):
    inputs = layer.inputs.clone()
    inputs[:, 5:12] = 0
    found = admm(layer.weight, inputs.T @ inputs, sparsity=0.5)
    assert found.weight.isfinite().all()
    assert not found.mask[:, 5:12].any()
    assert int(found.mask.sum()) == OUT * kept_per_row(IN, 0.5)


def test_arguments_are_left_as_they_were(layer):
    weight, gram = layer.weight.clone(), layer.gram
    before = gram.clone()
    admm(weight, gram, pattern="2:4")
    assert torch.equal(weight, layer.weight)
    assert torch.equal(gram, before)


def test_dampening_is_reported_and_faults_are_named(layer):
    assert admm(layer.weight, layer.gram, sparsity=0.5, dampening=0.03).dampening == 0.03
    few = layer.inputs[:9]  # without dampening, not definite
    raised = admm(layer.weight, few.T @ few, sparsity=0.5, dampening=0.0)
    assert 0 < raised.dampening <= 1e-4
    assert raised.weight.isfinite().all()
    with pytest.raises(ValueError, match="sparsity=None"):
        admm(layer.weight, layer.gram)
    with pytest.raises(ValueError, match="scope='all'"):
        admm(layer.weight, layer.gram, sparsity=0.5, scope="all")
    with pytest.raises(ValueError, match="gram: .*not finite"):
        admm(layer.weight, layer.gram * float("nan"), sparsity=0.5)
