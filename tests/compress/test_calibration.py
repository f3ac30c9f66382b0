"""The walk block by block against the whole model, and calibration text that does not do."""

import copy

import pytest
import torch

from hf_llmkernel.compress.block import Block
from hf_llmkernel.compress.calibration import Walk, calibration_ids
from hf_llmkernel.compress.recipe import Calibration
from hf_llmkernel.compress.statistics import InputGram, InputNorm
from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

from .conftest import TINY, word_tokenizer

VARIANTS = {
    "plain": {},
    "sliding": {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "per_layer": {"per_layer_config": {1: {"intermediate_size": 40}, 2: {"skip": ["attention"]}}, "qk_norm": True},
    "packed": {"linear_forms": {"up_proj": {"bits": 8, "group_size": 16}, "q_proj": {"rank": 4}}},
}


def build(fields) -> LLMKernelForCausalLM:
    torch.manual_seed(0)
    return LLMKernelForCausalLM(LLMKernelConfig(**TINY, **fields)).eval()


def blocks_of(model: LLMKernelForCausalLM) -> list[Block]:
    return [
        Block(index, copy.deepcopy(model.config.per_layer_config[index]), dict(layer.state_dict()))
        for index, layer in enumerate(model.model.layers)
    ]


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_walk_puts_out_what_the_model_does(name):
    model = build(VARIANTS[name])
    ids = torch.arange(5 * 700).view(5, 700) % 96  # two sequences a batch, one left over
    ids = ids[:, :128]
    expected = model.model(ids, output_hidden_states=True).hidden_states
    walk = Walk(model.config, model.model.embed_tokens(ids))
    for index, block in enumerate(blocks_of(model)):
        torch.testing.assert_close(walk.hidden, expected[index], rtol=1e-5, atol=1e-5)
        walk.advance(block)
    torch.testing.assert_close(model.model.norm(walk.hidden), expected[-1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_statistics_are_those_of_the_inputs():
    model = build({})
    ids = torch.randint(96, (40, 60), generator=torch.Generator().manual_seed(0))
    inputs = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    model(ids)
    x = inputs[0].flatten(0, 1).double()
    walk = Walk(model.config, model.model.embed_tokens(ids))
    before = walk.hidden.clone()
    norm, gram = InputNorm(), InputGram()
    block = blocks_of(model)[0]
    walk.observe(block, {"down_proj": norm})
    walk.observe(block, {"down_proj": gram})
    torch.testing.assert_close(norm.norm.double(), x.norm(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gram.gram.double(), x.T @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gram.norm, norm.norm)
    assert torch.equal(walk.hidden, before)


@torch.no_grad()
def test_activations_that_overflow_are_named():
    model = build({})
    model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    walk = Walk(model.config, model.model.embed_tokens(torch.arange(20).view(1, 20)))
    first, second, _ = blocks_of(model)
    walk.advance(first)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: its inputs overflow or are NaN"):
        walk.observe(second, {"down_proj": InputNorm()})
    with pytest.raises(ValueError, match=r"model.layers.1: its outputs are not finite"):
        walk.advance(second)


@pytest.mark.parametrize(
    ("calibration", "fields", "message"),
    [
        ({"samples": 1000, "length": 64}, {}, r"samples=1000, length=64: need 64000 tokens, the text has \d+"),
        ({"samples": 2, "length": 129}, {}, "calibration.length=129: is above .*max_position_embeddings=128"),
        ({"samples": 8, "length": 64}, {"vocab_size": 80}, "vocab_size=80: the tokenizer made token"),
    ],
)
def test_text_that_does_not_do_is_refused(text, calibration, fields, message):
    config = LLMKernelConfig(**{**TINY, **fields})
    with pytest.raises(ValueError, match=message):
        calibration_ids(Calibration(source=str(text), **calibration), word_tokenizer(), config)
