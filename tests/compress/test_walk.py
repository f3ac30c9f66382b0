"""The walk site by site against the whole model."""

import copy

import pytest
import torch

from hf_llmkernel.compress import walk as walking
from hf_llmkernel.compress.block import SITES, Block
from hf_llmkernel.compress.walk import Walk
from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

from .conftest import TINY

VARIANTS = {
    "plain": {},
    "sliding": {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "per_layer": {"per_layer_config": {1: {"intermediate_size": 40}, 2: {"skip": ["attention"]}}, "qk_norm": True},
    "empty_layer": {"per_layer_config": {1: {"skip": ["attention", "mlp"]}}},
    "packed": {"linear_forms": {"up_proj": {"bits": 8, "group_size": 16}, "q_proj": {"rank": 4}}},
}
ENTERED = {"attention_input": "q_proj", "attention_output": "o_proj", "mlp_input": "up_proj", "mlp_output": "down_proj"}


def build(fields) -> LLMKernelForCausalLM:
    torch.manual_seed(0)
    return LLMKernelForCausalLM(LLMKernelConfig(**TINY, **fields)).eval()


def blocks_of(model: LLMKernelForCausalLM) -> list[Block]:
    return [
        Block(index, copy.deepcopy(model.config.per_layer_config[index]), dict(layer.state_dict()))
        for index, layer in enumerate(model.model.layers)
    ]


def started(model, ids, folder) -> Walk:
    walk = Walk(model.config, folder, *ids.shape)
    walk.take_up(0, lambda begin, end: model.model.embed_tokens(ids[begin:end]))
    return walk


def hidden(walk: Walk) -> torch.Tensor:
    return walk.states.read(0, walk.states.samples)


def nothing(site, inputs):
    return None


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_walk_puts_out_what_the_model_does(name, tmp_path, monkeypatch):
    monkeypatch.setattr(walking, "BATCH_TOKENS", 256)  # two sequences a batch, one left over
    model = build(VARIANTS[name])
    ids = torch.arange(5 * 128).view(5, 128) % 96
    expected = model.model(ids, output_hidden_states=True).hidden_states
    walk = started(model, ids, tmp_path)
    for index, block in enumerate(blocks_of(model)):
        torch.testing.assert_close(hidden(walk), expected[index], rtol=1e-5, atol=1e-5)
        walk.run(block, {}, nothing, advance=True)
        walk.settle()
    torch.testing.assert_close(model.model.norm(hidden(walk)), expected[-1], rtol=1e-5, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 1
    walk.close()
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_statistics_are_those_of_the_inputs(tmp_path):
    model = build({})
    ids = torch.randint(96, (40, 60), generator=torch.Generator().manual_seed(0))
    inputs = {}
    for name, module in model.model.layers[0].named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in ENTERED.values():
            module.register_forward_pre_hook(lambda module, given, leaf=leaf: inputs.update({leaf: given[0]}))
    model(ids)
    walk = started(model, ids, tmp_path)
    before, seen = hidden(walk), {}
    walk.run(blocks_of(model)[0], dict.fromkeys(SITES, "gram"), lambda site, found: seen.update({site: found}), False)
    for site, leaf in ENTERED.items():
        x = inputs[leaf].flatten(0, 1).double()
        torch.testing.assert_close(seen[site].gram.double(), x.T @ x, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(seen[site].mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(hidden(walk), before)


@torch.no_grad()
def test_what_is_changed_at_a_site_is_seen_by_the_next_ones(tmp_path):
    model = build({})
    ids = torch.arange(3 * 50).view(3, 50) % 96
    block = blocks_of(model)[0]
    seen = {}

    def halve(site, inputs):
        seen[site] = inputs
        for leaf in SITES[site]:
            block.set_weight(leaf, block.weight(leaf) / 2)

    walk = started(model, ids, tmp_path)
    walk.run(block, {"mlp_output": "moments"}, halve, advance=True)
    for linear in model.model.layers[0].modules():
        if isinstance(linear, torch.nn.Linear):
            linear.weight.data /= 2
    entering = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, given: entering.append(given[0]))
    expected = model.model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(hidden(walk), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["mlp_output"].norm, entering[0].flatten(0, 1).norm(dim=0), rtol=1e-5, atol=1e-6)
    assert seen["mlp_input"] is None


@torch.no_grad()
def test_inputs_that_were_removed_are_left_out(tmp_path):
    model = build({})
    ids = torch.arange(3 * 50).view(3, 50) % 96
    block, keep = blocks_of(model)[0], torch.arange(0, 64, 2)

    def prune(site, inputs):
        if site != "mlp_output":
            return None
        block.store("down_proj", block.weight("down_proj")[:, keep], block.form("down_proj"))
        for leaf in ("gate_proj", "up_proj"):
            block.keep_outputs(leaf, keep)
        block.layer.intermediate_size = 32
        return keep

    walk = started(model, ids, tmp_path)
    walk.run(block, {}, prune, advance=True)
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight.data[:, 1::2] = 0
    expected = model.model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(hidden(walk), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_activations_that_overflow_are_named(tmp_path):
    model = build({})
    model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    walk = started(model, torch.arange(20).view(1, 20), tmp_path)
    first, second, _ = blocks_of(model)
    walk.run(first, {}, nothing, advance=True)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: its inputs overflow or are NaN"):
        walk.run(second, {"mlp_output": "moments"}, nothing, advance=False)
    with pytest.raises(ValueError, match=r"model.layers.1: its outputs are not finite"):
        walk.run(second, {}, nothing, advance=True)


@torch.no_grad()
def test_an_interrupted_walk_goes_on_where_its_files_end(tmp_path):
    model = build({})
    ids = torch.arange(3 * 50).view(3, 50) % 96
    walk = started(model, ids, tmp_path)
    first, second, _ = blocks_of(model)
    walk.run(first, {}, nothing, advance=True)
    walk.settle()
    walk.run(second, {}, nothing, advance=True)
    after = hidden(walk)  # both states are there: whether the second block was written is not known

    def refuse(begin, end):
        raise AssertionError("starts anew")

    again = Walk(model.config, tmp_path, *ids.shape)
    again.take_up(1, refuse)
    assert again.index == 1
    again.run(second, {}, nothing, advance=True)
    assert torch.equal(hidden(again), after)
