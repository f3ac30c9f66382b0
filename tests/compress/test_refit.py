"""The refit of what writes into the residual stream, against least squares on the whole model's hidden states."""

import numpy as np
import pytest
import torch

from hf_llmkernel.compress import compress
from hf_llmkernel.compress.calibration import calibration_ids
from hf_llmkernel.compress.refit import Refit, refit_weight
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

from .conftest import save_tiny, word_tokenizer
from .test_pipeline import load, logits, recipe_for


@pytest.mark.parametrize("dampening", [0.01, 1.0])
def test_weight_solves_the_least_squares_problem(dampening):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    y, weight = torch.randn(200, 5, generator=generator), torch.randn(5, 12, generator=generator)
    found, used = refit_weight(weight, x.T @ x, y.T @ x, dampening)
    ridge = np.sqrt(dampening * float(x.double().square().sum(0).mean()))
    rows = np.concatenate([x.double().numpy(), ridge * np.eye(12)])
    targets = np.concatenate([y.double().numpy(), ridge * weight.double().numpy().T])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert used == dampening


@torch.no_grad()
def refitted(model: LLMKernelForCausalLM, ids: torch.Tensor, sources: list[int]):
    """A model of the layers `sources`, each refitted to the whole model's hidden states, one after the other."""
    ends = [*sources[1:], len(model.model.layers)]
    wanted = list(model.model(ids, output_hidden_states=True).hidden_states[:-1])
    last = []
    model.model.norm.register_forward_pre_hook(lambda module, given: last.append(given[0]))
    middles = {}
    for index, layer in enumerate(model.model.layers):
        if layer.attends:

            def note(module, given, out, index=index):  # what a hook returns would take the output's place
                middles.setdefault(index, wanted[index] + out)

            layer.self_attn.o_proj.register_forward_hook(note)
    model(ids)
    wanted.append(last[-1])
    layers = [model.model.layers[index] for index in sources]
    states, rotary = wanted[0], model.model.rotary_emb
    positions = rotary(states, torch.arange(ids.shape[1])[None])
    for layer, source, end in zip(layers, sources, ends, strict=True):
        for sublayer, norm, leaf in (
            ("self_attn", "input_layernorm", "o_proj"),
            ("mlp", "post_attention_layernorm", "down_proj"),
        ):
            if not hasattr(layer, sublayer):
                continue
            inner, seen = getattr(layer, sublayer), []
            linear = getattr(inner, leaf)
            hook = linear.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
            given = {"position_embeddings": positions} if sublayer == "self_attn" else {}
            inner(getattr(layer, norm)(states), **given)
            hook.remove()
            x = seen[0].flatten(0, 1).double()
            target = middles[source] if sublayer == "self_attn" and hasattr(layer, "mlp") else wanted[end]
            y = (target - states).flatten(0, 1).double() - (0 if linear.bias is None else linear.bias.double())
            ridge = (0.1 * (x**2).sum(0).mean()).sqrt()
            rows = torch.cat([x, ridge * torch.eye(x.shape[1], dtype=torch.float64)])
            solved = torch.linalg.lstsq(rows, torch.cat([y, ridge * linear.weight.double().T])).solution.T
            linear.weight = torch.nn.Parameter(solved.float())
            states = states + linear(seen[0])
    return layers


@pytest.mark.parametrize(
    "fields", [{}, {"attention_bias": True, "mlp_bias": True, "per_layer_config": {2: {"skip": ["mlp"]}}}]
)
def test_layers_left_make_up_for_the_dropped_one(tmp_path, text, fields, monkeypatch):
    from hf_llmkernel.compress.prune.depth import DropLayers

    monkeypatch.setattr(DropLayers, "decide", lambda stage, survey: stage._decision([(1, "layer")], [], 3))
    dense = save_tiny(tmp_path / "dense", **fields)
    recipe = recipe_for(text, {"drop_layers": {"count": 1}}, "refit")
    compress(tmp_path / "dense", recipe, tmp_path / "out", progress=False)
    compress(tmp_path / "dense", recipe_for(text, {"drop_layers": {"count": 1}}), tmp_path / "plain", progress=False)
    ids = calibration_ids(recipe.calibration, word_tokenizer(), dense.config)
    before = logits(dense)
    for found, expected in zip(load(tmp_path / "out").model.layers, refitted(dense, ids, [0, 2]), strict=True):
        for name, parameter in found.named_parameters():
            torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=1e-3, atol=1e-3)
    refit, plain = logits(load(tmp_path / "out")), logits(load(tmp_path / "plain"))
    assert (refit - before).norm() < 0.9 * (plain - before).norm()


def test_nothing_changes_where_nothing_was_lost(tmp_path, tiny, text):
    compress(tiny, recipe_for(text, "refit"), tmp_path / "out", progress=False)
    dense = logits(LLMKernelForCausalLM.from_pretrained(tiny))
    torch.testing.assert_close(logits(load(tmp_path / "out")), dense, rtol=1e-3, atol=1e-3)


def test_forms_that_cannot_be_are_refused_before_any_work(tmp_path, tiny, text):
    with pytest.raises(ValueError, match="refit: layers.0.self_attn.o_proj is stored as .*before sparsify"):
        sparse = {"sparsify": {"pattern": "2:4", "method": "magnitude"}}
        compress(tiny, recipe_for(text, sparse, "refit"), tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="dampening=-1"):
        Refit(dampening=-1)
