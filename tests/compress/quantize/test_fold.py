"""Folds: the block computes what it did, and the factors are those of AWQ's search written out."""

import copy

import numpy as np
import pytest
import torch

from hf_llmkernel.compress.block import Block, matrix_shape
from hf_llmkernel.compress.inputs import InputStatistic
from hf_llmkernel.compress.quantize.fold import (
    EXPONENTS,
    awq_factors,
    fold,
    shared_by_heads,
    smooth_factors,
    takers,
)
from hf_llmkernel.compress.quantize.gptq import gptq
from hf_llmkernel.compress.quantize.stage import Quantize
from hf_llmkernel.compress.walk import Walk
from hf_llmkernel.model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

from ..conftest import TINY
from .conftest import naive_range_grid, naive_round

SITES = ("attention_input", "attention_output", "mlp_input", "mlp_output")
IDS = torch.randint(96, (6, 40), generator=torch.Generator().manual_seed(0))
INT4 = LinearForm(bits=4, group_size=16)


def whole_model(**fields) -> LLMKernelForCausalLM:
    torch.manual_seed(0)
    model = LLMKernelForCausalLM(LLMKernelConfig(**TINY, attention_bias=True, mlp_bias=True, **fields)).eval()
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            if parameter.dim() == 1:  # norms and biases
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def block_of(model: LLMKernelForCausalLM) -> Block:
    return Block(0, copy.deepcopy(model.config.per_layer_config[0]), dict(model.model.layers[0].state_dict()))


def walked(model: LLMKernelForCausalLM, block: Block, visit, folder, needs="gram") -> torch.Tensor:
    """The states after a block that `visit` changes."""
    walk = Walk(model.config, folder, *IDS.shape)
    walk.take_up(0, lambda begin, end: model.model.embed_tokens(IDS[begin:end]))
    walk.run(block, dict.fromkeys(SITES, needs), visit, advance=True)
    return walk.states.read(0, len(IDS))


def low_rank(block: Block) -> None:
    for leaf in ("v_proj", "up_proj", "down_proj"):
        (rows, columns), draw = matrix_shape(block.layer, leaf), torch.Generator().manual_seed(1)
        a, b = torch.randn(4, columns, generator=draw), torch.randn(rows, 4, generator=draw)
        block.factorize(leaf, a / 4, b / 4)


def integer(block: Block) -> None:
    for leaf in ("v_proj", "up_proj"):
        form = LinearForm(bits=8, group_size=16, symmetric=False, scale_dtype="float32")
        block.store(leaf, block.weight(leaf), form)


def sparse(block: Block) -> None:
    for leaf in ("v_proj", "up_proj", "down_proj", "q_proj"):
        weight = block.weight(leaf)
        block.store(leaf, weight * (torch.arange(weight.shape[1]) % 4 < 2), LinearForm(sparsity="2:4"))


FOLDED = [(site, form) for site in SITES for form in (None, low_rank, sparse)]
FOLDED += [("attention_output", integer), ("mlp_output", integer)]  # whose own columns cannot be scaled


@pytest.mark.parametrize(("site", "form"), FOLDED)
@torch.no_grad()
def test_a_folded_block_computes_what_it_did(site, form, tmp_path):
    model = whole_model()
    block = block_of(model)
    if form is not None:
        form(block)
    expected = walked(model, copy.deepcopy(block), lambda at, inputs: None, tmp_path / "plain")

    def visit(at, inputs):
        if at != site:
            return None
        factors = shared_by_heads(block.layer, site, inputs.mean_magnitude, torch.mean) + 0.2
        before = {name: block.weight(name) for name in takers(block.layer, site)}
        fold(block, site, factors)
        for name, weight in before.items():
            torch.testing.assert_close(block.weight(name), weight * factors)
        return 1 / factors

    found = walked(model, block, visit, tmp_path / "folded")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    again = walked(model, block, lambda at, inputs: None, tmp_path / "again")
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    block.check()


def test_the_factors_are_those_of_the_papers_search(layer):
    """s = m^α over 20 exponents, rounded to nearest group by group, the outputs' squared error itself."""
    form, magnitude = LinearForm(bits=4, group_size=12), layer.inputs.abs().mean(0)
    inputs, weight, losses = layer.inputs.double().numpy(), layer.weight.numpy(), []
    for step in range(20):
        factors = magnitude.numpy() ** (step / 20)
        factors = factors / np.sqrt(factors.max() * factors.min())
        rounded = np.zeros(weight.shape)
        for row, values in enumerate(weight * factors):
            for begin in range(0, len(values), 12):
                group = values[begin : begin + 12].tolist()
                scale, zero = naive_range_grid(group, form)
                rounded[row, begin : begin + 12] = [naive_round(value, scale, zero, form) for value in group]
        losses.append(np.square(inputs @ (weight - rounded / factors).T).sum())
    found = awq_factors(layer.weight, magnitude, form, lambda e: (e @ layer.gram * e).sum())
    assert found.exponent == EXPONENTS[int(np.argmin(losses))] > 0
    assert found.loss == pytest.approx(min(losses) / losses[0], rel=1e-4) and found.loss < 0.9
    expected = magnitude**found.exponent
    torch.testing.assert_close(found.factors, expected / (expected.max() * expected.min()).sqrt())


def test_smooth_factors_share_ranges_between_inputs_and_weights(layer):
    """Inputs and columns have the same range afterwards; int8 inputs err less, as rounding them does show."""
    largest = layer.inputs.abs().amax(0)
    found = smooth_factors(layer.weight, largest)
    factors = [
        (max(abs(x) for x in column) / max(abs(w) for w in weights)) ** 0.5
        for column, weights in zip(layer.inputs.T.tolist(), layer.weight.T.tolist(), strict=True)
    ]
    torch.testing.assert_close(found.factors, torch.tensor(factors), rtol=1e-5, atol=0)
    torch.testing.assert_close(largest / found.factors, (layer.weight * found.factors).abs().amax(0))

    def rounded_loss(inputs, weight):
        step = inputs.abs().max() / 127
        return float((((inputs / step).round() * step - inputs) @ weight.T).square().mean())

    before = rounded_loss(layer.inputs, layer.weight)
    after = rounded_loss(layer.inputs / found.factors, layer.weight * found.factors)
    assert found.exponent == 0.5 and found.loss < 0.5
    assert after / before == pytest.approx(found.loss, rel=0.25)


def test_inputs_that_never_occur_keep_factors_finite():
    magnitude = torch.tensor([0.0, 1.0, 2.0, 4.0])
    found = awq_factors(torch.randn(4, 4), magnitude, LinearForm(bits=4), lambda e: e.square().sum())
    assert found.factors.isfinite().all() and (found.factors > 0).all()
    found = smooth_factors(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 1.0]))
    assert found.factors.isfinite().all() and (found.factors > 0).all()


def test_heads_that_share_a_value_head_share_its_factors():
    layer = LLMKernelConfig(**TINY)  # four heads of 8, two value heads
    magnitude = torch.arange(32.0)
    shared = shared_by_heads(layer, "attention_output", magnitude, torch.mean)
    assert torch.equal(shared[:8], shared[8:16]) and torch.equal(shared[16:24], shared[24:])
    assert torch.equal(shared[:8], (magnitude[:8] + magnitude[8:16]) / 2)
    largest = shared_by_heads(layer, "attention_output", magnitude, torch.amax)
    assert torch.equal(largest, magnitude.view(2, 2, 8)[:, 1:].expand(2, 2, 8).reshape(32))
    assert torch.equal(shared_by_heads(layer, "mlp_input", magnitude, torch.mean), magnitude)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@torch.no_grad()
def test_a_fold_lowers_what_rounding_loses(method, tmp_path):
    """Of a block whose inputs differ much in size, as those of real ones do; what it computes is what was walked."""
    model = whole_model()
    sizes = torch.randn(32, generator=torch.Generator().manual_seed(3)).exp()
    for norm, leaves in (("input_layernorm", "qkv"), ("post_attention_layernorm", ("gate", "up"))):
        getattr(model.model.layers[0], norm).weight.mul_(sizes)
        part = model.model.layers[0].self_attn if len(leaves) == 3 else model.model.layers[0].mlp
        for leaf in leaves:
            getattr(part, f"{leaf}_proj").weight.div_(sizes)
    expected = walked(model, block_of(model), lambda at, inputs: None, tmp_path / "exact")
    errors = {}
    for kind in (None, "awq"):
        stage = Quantize(bits=4, group_size=16, scale_dtype="float32", method=method, fold=kind)
        block = block_of(model)
        found = walked(model, block, lambda at, inputs, b=block, s=stage: s.apply(b, at, inputs), tmp_path / f"{kind}")
        errors[kind] = (found - expected).square().sum()
        again = walked(model, block, lambda at, inputs: None, tmp_path / f"{kind} again")
        torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-4)
        folds = [note for note in block.notes if "exponent" in note]
        assert [note["site"] for note in folds] == ([] if kind is None else list(SITES))
        block.check()
    assert errors["awq"] < 0.9 * errors[None]


@torch.no_grad()
def test_the_smooth_fold_tells_what_int8_inputs_would_lose(tmp_path):
    model = whole_model()
    block, stage = block_of(model), Quantize(bits=8, group_size=None, scale_dtype="float32", fold="smoothquant")
    found = walked(model, block, lambda at, inputs: stage.apply(block, at, inputs), tmp_path / "smooth", needs="gram")
    expected = walked(model, block_of(model), lambda at, inputs: None, tmp_path / "exact")
    assert ((found - expected).square().sum() / expected.square().sum()) < 1e-3
    assert [note["site"] for note in block.notes] == list(SITES)
    assert all(note["exponent"] == 0.5 and 0 < note["activation_loss"] < 1.1 for note in block.notes)


@torch.no_grad()
def test_a_method_rounds_the_scaled_weight_for_the_scaled_inputs():
    statistic = InputStatistic("gram")
    statistic.add(torch.randn(200, 32, generator=torch.Generator().manual_seed(1)) * torch.arange(1.0, 33))
    block = block_of(whole_model())
    weight = block.weight("q_proj")
    stage = Quantize(bits=4, group_size=16, method="gptq", fold="awq", include=("q_proj",))
    change = stage.apply(block, "attention_input", statistic)
    assert change is not None and change.max() > 1.5
    gram = statistic.gram * change * change.unsqueeze(1)
    expected = gptq(weight / change, gram, INT4, act_order=True, scale_search=True)
    torch.testing.assert_close(block.weight("q_proj"), expected.weight, rtol=1e-5, atol=1e-6)


def test_a_matrix_that_is_integer_already_is_refused():
    layer = LLMKernelConfig(**TINY)
    Quantize(bits=8, include=("k_proj",)).plan(layer)
    with pytest.raises(ValueError, match="k_proj is stored as int8, .* fold='awq' scales its columns: leave"):
        Quantize(bits=4, include=("q_proj",), fold="awq").plan(layer)
    Quantize(bits=4, include=("o_proj",), fold="awq").plan(layer)  # v_proj may be anything


@torch.no_grad()
def test_a_feed_forward_without_gate_is_not_folded_and_says_so():
    layer = LLMKernelConfig(**TINY, mlp_gated=False)
    facts = Quantize(bits=4, group_size=16, fold="awq").plan(copy.deepcopy(layer))
    assert facts["not_folded"] == ["down_proj"]
    statistic = InputStatistic("gram")
    statistic.add(torch.randn(50, 64))
    torch.manual_seed(0)
    block = block_of(LLMKernelForCausalLM(LLMKernelConfig(**TINY, mlp_gated=False)))
    stage = Quantize(bits=4, group_size=16, fold="awq", include=("down_proj",))
    assert stage.apply(block, "mlp_output", statistic) is None
    assert block.form("down_proj").bits == 4 and not block.notes


def test_an_unknown_fold_is_refused():
    with pytest.raises(ValueError, match=r"fold='no': must be one of \[None, 'awq', 'smoothquant'\]"):
        Quantize(bits=4, fold="no")


def test_a_scale_that_overflows_names_the_matrix():
    block = block_of(whole_model())
    block.store("up_proj", block.weight("up_proj"), INT4)
    with pytest.raises(ValueError, match="mlp.up_proj: scale_dtype='float16' overflows"):
        block.scale_outputs("up_proj", torch.full((64,), 1e8))
