"""SparseGPT against Optimal Brain Surgeon row by row, every inverse computed anew."""

import numpy as np
import pytest
import torch

from hf_llmkernel.compress.sparsify.mask import kept_per_row
from hf_llmkernel.compress.sparsify.sparsegpt import sparsegpt

from .conftest import IN, OUT


def surgeon(weight, hessian, choose):
    """Removes weights from left to right with the optimal change of those to their right, in fp64.

    `choose(column, weight, costs)` gives the mask `[O, I]` known when a column is reached; `costs` is
    `[H_j:,j:⁻¹]_jj` for every j.
    """
    weight = weight.double().numpy().copy()
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(len(hessian))]
    costs = np.array([inverse[0, 0] for inverse in inverses])
    for j, inverse in enumerate(inverses):
        kept = choose(j, weight, costs)
        for row in range(len(weight)):
            if not kept[row, j]:
                weight[row, j:] -= weight[row, j] / inverse[0, 0] * inverse[0]
    return weight * kept, kept


def close(found, expected, scale=1.0):
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-4 * scale)


@pytest.mark.parametrize("block_size", [8, 16, 128])
@pytest.mark.parametrize("dampening", [0.01, 0.5])
def test_update_on_a_given_mask_is_the_surgeons(layer, block_size, dampening):
    mask = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(1)) > 0.5
    expected, _ = surgeon(layer.weight, layer.damped_hessian(dampening), lambda j, weight, costs: mask.numpy())
    found = sparsegpt(layer.weight, layer.gram, mask=mask, block_size=block_size, dampening=dampening)
    close(found.weight, expected)
    assert torch.equal(found.mask, mask)
    assert found.dampening == dampening


@pytest.mark.parametrize("block_size", [3, 8, 128])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:5"])  # 36 columns end in a group of one of 2:5
def test_groups_are_decided_where_they_begin(layer, pattern, block_size):
    kept_of, size = map(int, pattern.split(":"))
    mask = np.ones((OUT, IN), dtype=bool)

    def choose(j, weight, costs):
        if j % size == 0:
            scores = weight[:, j : j + size] ** 2 / costs[j : j + size]
            for row, order in enumerate(np.argsort(-scores, axis=1)):
                mask[row, j : j + size] = np.isin(np.arange(scores.shape[1]), order[:kept_of])
        return mask

    expected, expected_mask = surgeon(layer.weight, layer.damped_hessian(0.01), choose)
    found = sparsegpt(layer.weight, layer.gram, pattern=pattern, block_size=block_size)
    assert np.array_equal(found.mask.numpy(), expected_mask)
    close(found.weight, expected)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("block_size", [8, 10, 128])
def test_unstructured_weights_compete_within_a_block_of_columns(layer, sparsity, block_size):
    mask = np.ones((OUT, IN), dtype=bool)
    total = OUT * kept_per_row(IN, sparsity)

    def choose(j, weight, costs):
        if j % block_size == 0:
            end = min(j + block_size, IN)
            kept = total * end // IN - total * j // IN
            scores = weight[:, j:end] ** 2 / costs[j:end]
            mask[:, j:end] = scores >= np.sort(scores, axis=None)[-kept]
        return mask

    expected, expected_mask = surgeon(layer.weight, layer.damped_hessian(0.01), choose)
    found = sparsegpt(layer.weight, layer.gram, sparsity, block_size=block_size)
    assert np.array_equal(found.mask.numpy(), expected_mask)
    assert int(found.mask.sum()) == total
    close(found.weight, expected)


def test_update_lowers_the_loss_of_its_mask(layer):
    found = sparsegpt(layer.weight, layer.gram, 0.5)
    assert layer.loss(found.weight) < 0.8 * layer.loss(layer.weight * found.mask)
    assert not found.weight[~found.mask].any()


def test_inputs_that_never_occur_lose_their_weights_first(layer):
    inputs = layer.inputs.clone()
    inputs[:, 5:12] = 0
    found = sparsegpt(layer.weight, inputs.T @ inputs, 0.5, block_size=18)
    assert not found.weight[:, 5:12].any()
    assert not found.mask[:, 5:12].any()  # 7 of the 9 columns' worth that the block removes
    assert int(found.mask.sum()) == OUT * 18
    assert found.weight.isfinite().all()


def test_inputs_are_left_as_they_were_and_any_dtype_is_taken(layer):
    weight, gram, mask = layer.weight.bfloat16(), layer.gram, torch.rand(OUT, IN) > 0.5
    before = weight.clone(), gram.clone(), mask.clone()
    found = sparsegpt(weight, gram, mask=mask)
    assert found.weight.dtype == torch.float32
    sparsegpt(weight, gram, pattern="2:4")
    for tensor, expected in zip((weight, gram, mask), before, strict=True):
        assert torch.equal(tensor, expected)


def test_dampening_that_was_raised_is_reported(layer):
    gram = torch.eye(IN)
    gram[0, 0] = -0.05
    assert sparsegpt(layer.weight, gram, 0.5, dampening=0.02).dampening == pytest.approx(0.2)


def test_faults_are_named(layer):
    with pytest.raises(ValueError, match="sparsity=None"):
        sparsegpt(layer.weight, layer.gram)
    with pytest.raises(ValueError, match="sparsity=0.3: pattern='2:4'"):
        sparsegpt(layer.weight, layer.gram, 0.3, "2:4")
    with pytest.raises(ValueError, match="gram: .*not finite"):
        sparsegpt(layer.weight, layer.gram * float("inf"), 0.5)
