"""The quantize stage: which linears it takes, and what a block holds afterwards."""

import copy

import pytest
import torch

from hf_llmkernel.compress.block import SITES, Block, module_path
from hf_llmkernel.compress.quantize.stage import Quantize
from hf_llmkernel.model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelDecoderLayer

from ..conftest import TINY


@pytest.fixture
def block():
    config = LLMKernelConfig(**TINY, attention_bias=True)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    tensors = LLMKernelDecoderLayer(config, 0).state_dict()
    return Block(0, copy.deepcopy(config), dict(tensors))


def apply(stage, block: Block) -> None:
    """The stage at every site in turn, as a sweep without calibration does it."""
    for site in SITES:
        stage.apply(block, site, None)


def nearest_on_grid(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Symmetric round to nearest, one value at a time."""
    result = torch.empty_like(weight)
    top = 2 ** (bits - 1) - 1
    for row in range(weight.shape[0]):
        for begin in range(0, weight.shape[1], group):
            values = [float(value) for value in weight[row, begin : begin + group]]
            scale = float(torch.tensor(max(map(abs, values)) / top).half())
            for offset, value in enumerate(values):
                result[row, begin + offset] = round(value / scale) * scale
    return result


@pytest.mark.parametrize("bits", [8, 4])
def test_every_linear_is_rounded_to_its_grid(block, bits):
    before = {leaf: block.weight(leaf) for leaf in block.linears()}
    bias = block.tensors["self_attn.q_proj.bias"].clone()
    apply(Quantize(bits=bits, group_size=16), block)
    module = block.module()
    for leaf, weight in before.items():
        linear = module.get_submodule(module_path(leaf))
        torch.testing.assert_close(linear.dense_weight(), nearest_on_grid(weight, bits, 16), rtol=1e-6, atol=1e-7)
    assert torch.equal(module.self_attn.q_proj.bias, bias)
    block.check()


def test_include_and_exclude_choose_by_name_and_glob(block):
    apply(Quantize(bits=8, include=["*_proj"], exclude=["down_proj", "?_proj"]), block)
    assert set(block.layer.linear_forms) == {"gate_proj", "up_proj"}
    assert block.tensors["mlp.gate_proj.values"].dtype == torch.int8
    assert block.tensors["mlp.down_proj.weight"].dtype == torch.float32
    block.check()


def test_a_name_that_matches_nothing_is_refused(block):
    with pytest.raises(ValueError, match="'fc1' matches no linear; .*'q_proj'"):
        Quantize(bits=8, include=["fc1"]).check_choice(block.layer)


def test_what_is_packed_already_is_refused(block):
    Quantize(bits=8).plan(block.layer)
    with pytest.raises(ValueError, match="q_proj is stored as .*'bits': 8.* quantized already"):
        Quantize(bits=4).plan(block.layer)


def test_a_low_rank_linear_gets_integer_factors(block):
    weight = block.weight("up_proj")
    block.factorize("up_proj", weight[:8], torch.randn(64, 8, generator=torch.Generator().manual_seed(1)))
    a, b = block.weight("up_proj.a"), block.weight("up_proj.b")
    apply(Quantize(bits=8, group_size=16, include=["up_proj"]), block)
    torch.testing.assert_close(block.weight("up_proj.a"), nearest_on_grid(a, 8, 16), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(block.weight("up_proj.b"), nearest_on_grid(b, 8, 16), rtol=1e-6, atol=1e-7)
    block.check()


def test_a_sparse_matrix_keeps_its_mask(block):
    weight = block.weight("up_proj")
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    block.store("up_proj", weight * mask, LinearForm(sparsity="bitmask", nnz=int(mask.sum())), mask=mask)
    apply(Quantize(bits=4, group_size=16, include=["up_proj"]), block)
    assert torch.equal(block.mask("up_proj"), mask)
    expected = nearest_on_grid(weight * mask, 4, 16)
    torch.testing.assert_close(block.weight("up_proj"), expected, rtol=1e-6, atol=1e-7)
    block.check()


@pytest.mark.parametrize(
    "settings",
    [{"bits": 3}, {"method": "no"}, {"group_size": 0}, {"symmetric": "no"}, {"include": "q_proj"}, {"embeddings": 1}],
)
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Quantize(**{"bits": 8, **settings})
