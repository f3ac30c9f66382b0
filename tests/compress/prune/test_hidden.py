"""Whole runs of `prune_hidden`: streams that lie in a subspace lose nothing, and what is kept is what formulas say."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_llmkernel.compress import compress
from hf_llmkernel.compress.calibration import calibration_ids
from hf_llmkernel.compress.preview import preview
from hf_llmkernel.compress.recipe import Recipe
from hf_llmkernel.compress.sweep import Sweep
from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import (
    LLMKernelForCausalLM,
    LLMKernelForSequenceClassification,
    LLMKernelModel,
)

from ..conftest import TINY, save_tiny, word_tokenizer
from ..test_pipeline import load, logits, recipe_for

H, K = 32, 24
IDS = torch.arange(40).view(2, 20) % 90
VARIANTS = {
    "tied": {},
    "untied_with_biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "qk_norm": True},
    "own_widths_and_skips": {
        "per_layer_config": {
            0: {"intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1},
            1: {"skip": ["attention"]},
            2: {"skip": ["mlp"]},
        }
    },
    "not_gated": {"mlp_gated": False, "hidden_act": "relu", "sliding_window": 7},
    "low_rank": {
        "linear_forms": {"up_proj": {"rank": 4}, "q_proj": {"rank": 8}, "o_proj": {"rank": 6, "bias": True}},
        "embed_tokens_form": {"rank": 20},
    },
}


PARTS = torch.randperm(H, generator=torch.Generator().manual_seed(5)).split([20, 12])


def prune(method, **settings):
    return {"prune_hidden": {"ratio": 0.25, "align": 8, "method": method, **settings}}


def onto_directions(channels: torch.Tensor, width: int) -> torch.Tensor:
    """The projection onto random directions of some channels, `[H, H]`."""
    span = torch.zeros(H, width)
    generator = torch.Generator().manual_seed(7)
    span[channels] = torch.linalg.qr(torch.randn(len(channels), width, generator=generator)).Q
    return span @ span.T


SPANS = {
    "channels": torch.diag((torch.randperm(H, generator=torch.Generator().manual_seed(7)) < K).float()),
    "directions": onto_directions(torch.arange(H), K),
    "directions_of_parts": onto_directions(PARTS[0], 15) + onto_directions(PARTS[1], 9),
}


@torch.no_grad()
def confine(model, span) -> None:
    """Makes everything that writes into the stream write into a subspace of K dimensions."""
    onto = SPANS[span]
    for name, parameter in model.named_parameters():
        low_rank = ".a." in name or ".b." in name
        if "embed_tokens" in name and (not low_rank or ".a." in name):
            parameter.copy_(parameter @ onto)
        elif ("o_proj" in name or "down_proj" in name) and (not low_rank or ".b." in name):
            parameter.copy_(onto @ parameter)


KINDS = {
    "untied": ("directions", prune("pca", untie=True)),
    "alike": ("directions_of_parts", prune("pca")),
    "channels": ("channels", prune("minitron")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_components_that_are_zero_are_not_missed(tmp_path, text, variant, kind):
    (span, stage), unties = KINDS[kind], kind == "untied"
    dense = save_tiny(tmp_path / "dense", **{**VARIANTS[variant], "rms_norm_eps": 1e-2})
    confine(dense, span)
    if kind == "alike":  # of the last norm; all others differ from channel to channel
        for part, scale in zip(PARTS, (1.5, -0.7), strict=True):
            dense.model.norm.weight.data[part] = scale
    dense.save_pretrained(tmp_path / "dense")
    result = compress(tmp_path / "dense", recipe_for(text, stage), tmp_path / "out", progress=False)
    model = load(tmp_path / "out")
    assert model.config.hidden_size == K and model.model.layers[0].self_attn.q_proj.in_features == K
    assert model.config.head_dim == dense.config.head_dim
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert logits(dense).std() > 0.1

    tied = dense.config.tie_word_embeddings
    assert model.config.tie_word_embeddings == (tied and not unties)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert any("lm_head" in name for name in names) != model.config.tie_word_embeddings
    decision = result.stages[0]["decision"]
    assert decision["energy_kept"] == pytest.approx(1, abs=1e-5)
    assert decision["unties"] == (tied and unties)
    assert decision["parameters"] == sum(p.numel() for p in model.parameters())
    assert decision["parameters_before"] == sum(p.numel() for p in dense.parameters())
    assert {"hidden_size_before": H, "hidden_size": K}.items() <= result.stages[0]["result"][0].items()


@torch.no_grad()
def test_a_tied_head_shares_the_spread_of_scales_with_the_embedding(tmp_path, text):
    dense = save_tiny(tmp_path / "dense")
    confine(dense, "directions")
    gain = dense.model.norm.weight.copy_(1.5 + 0.3 * torch.rand(H)).clone()
    dense.save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", recipe_for(text, prune("pca")), tmp_path / "out", progress=False)
    fields = {**dense.config.to_dict(), "tie_word_embeddings": False}
    reference = LLMKernelForCausalLM(LLMKernelConfig.from_dict(fields)).eval()
    reference.load_state_dict(dense.state_dict())
    shared = dense.model.embed_tokens.weight * (gain / gain.mean()).sqrt() @ SPANS["directions"]
    reference.model.embed_tokens.weight.copy_(shared)
    reference.lm_head.weight.copy_(shared * gain.mean())
    reference.model.norm.weight.fill_(1)
    found, expected = logits(load(tmp_path / "out")), logits(reference)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert 0.001 < (expected - logits(dense)).norm() / logits(dense).norm() < 0.1


@torch.no_grad()
def norm_inputs(model, ids) -> list[tuple[torch.nn.Module, torch.Tensor]]:
    """Every norm of the stream and what enters it, each token at a root mean square of one."""
    seen = []
    norms = [module for name, module in model.named_modules() if name.endswith("norm") and "_norm" not in name]
    for module in norms:
        module.register_forward_pre_hook(lambda module, given: seen.append((module, given[0].flatten(0, 1).double())))
    model(ids)
    assert len(seen) == 7
    return [(module, x / x.square().mean(-1, keepdim=True).sqrt()) for module, x in seen]


def test_what_is_kept_is_what_the_formulas_say_and_directions_keep_more_than_channels(tmp_path, text):
    dense = save_tiny(tmp_path / "dense")
    mix = torch.eye(H) + 0.5 * torch.randn(H, H, generator=torch.Generator().manual_seed(3))  # a correlated stream
    dense.model.embed_tokens.weight.data @= mix
    dense.save_pretrained(tmp_path / "dense")
    stages = {"pca": prune("pca", untie=True), "minitron": prune("minitron")}
    kept, recipes = {}, {method: recipe_for(text, stage) for method, stage in stages.items()}
    for method, recipe in recipes.items():
        result = compress(tmp_path / "dense", recipe, tmp_path / method, progress=False)
        kept[method] = result.stages[0]["decision"]["energy_kept"]
    inputs = norm_inputs(dense, calibration_ids(recipes["pca"].calibration, word_tokenizer(), dense.config))
    rows = torch.cat([x for _, x in inputs])
    energies = torch.linalg.svdvals(rows).square()
    assert kept["pca"] == pytest.approx(float(energies[:K].sum() / energies.sum()), abs=1e-5)

    scores = sum((module.weight * x).abs().mean(0) for module, x in inputs)
    channels = sorted(sorted(range(H), key=lambda j: -scores[j])[:K])
    assert kept["minitron"] == pytest.approx(float(rows[:, channels].square().sum() / rows.square().sum()), abs=1e-5)
    pruned = load(tmp_path / "minitron").model
    before = dense.model.embed_tokens.weight[:, channels]
    torch.testing.assert_close(pruned.embed_tokens.weight, (K / H) ** 0.5 * before, rtol=1e-6, atol=1e-6)
    assert kept["pca"] > kept["minitron"] + 0.05


def test_the_next_stage_sees_the_new_width(tmp_path, tiny, text):
    after = {"prune_ffn": {"ratio": 0.25, "align": 16}}
    first = prune("pca", untie=True)
    together = recipe_for(text, first, after, {"quantize": {"bits": 8, "embeddings": True}})
    compress(tiny, together, tmp_path / "together", progress=False)
    compress(tiny, recipe_for(text, first), tmp_path / "first", progress=False)
    rest = {**together.to_dict(), "stages": together.to_dict()["stages"][1:]}
    compress(tmp_path / "first", rest, tmp_path / "second", progress=False)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("together", "second"))
    assert one.keys() == two.keys() and {"lm_head.values", "model.embed_tokens.values"} <= one.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupted_run_goes_on_with_the_same_decision(tmp_path, tiny, text, monkeypatch):
    recipe = recipe_for(text, prune("pca"))
    compress(tiny, recipe, tmp_path / "whole", progress=False)
    write = Sweep._write_block

    def stop(self, block):
        if block.index == 1:
            raise KeyboardInterrupt
        write(self, block)

    monkeypatch.setattr(Sweep, "_write_block", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny, recipe, tmp_path / "out", progress=False)
    monkeypatch.setattr(Sweep, "_write_block", write)
    compress(tiny, recipe, tmp_path / "out", progress=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1] and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("method", ["pca", "minitron"])
def test_another_head_than_that_of_a_language_model(tmp_path, text, method):
    torch.manual_seed(0)
    dense = LLMKernelForSequenceClassification(LLMKernelConfig(**TINY, num_labels=5, pad_token_id=0)).eval()
    torch.nn.init.normal_(dense.model.norm.weight)
    confine(dense, {"pca": "directions", "minitron": "channels"}[method])
    dense.save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", recipe_for(text, prune(method)), tmp_path / "out", word_tokenizer(), progress=False)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(model.eval()), logits(dense), rtol=1e-4, atol=1e-4)


def test_a_model_without_head_keeps_its_channels(tmp_path, text):
    torch.manual_seed(0)
    dense = LLMKernelModel(LLMKernelConfig(**TINY)).eval()
    confine(dense, "channels")
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="method='pca': the model has no head"):
        compress(tmp_path / "dense", recipe_for(text, prune("pca")), tmp_path / "out", word_tokenizer(), progress=False)
    recipe = recipe_for(text, prune("minitron"))
    compress(tmp_path / "dense", recipe, tmp_path / "out", word_tokenizer(), progress=False)
    kept = SPANS["channels"].diagonal().nonzero().flatten()
    with torch.no_grad():
        expected = dense(IDS).last_hidden_state[..., kept]
        found = LLMKernelModel.from_pretrained(tmp_path / "out").eval()(IDS).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_plan_counts_the_head_of_its_own(tiny, text):
    stages = prune("pca", untie=True), prune("pca"), prune("minitron")
    untied, *tied = (preview(tiny, recipe_for(text, stage)).stages[0]["parameters"] for stage in stages)
    assert [untied - parameters for parameters in tied] == [96 * K, 96 * K]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([prune("pca", layers=[0, 1])], "include, exclude, layers and embeddings: hidden_size is one for"),
        ([prune("pca", align=64)], "prune_hidden: hidden_size: ratio=0.25: of 32 leaves 24"),
        ([prune("minitron", untie=True)], "untie=true: method 'minitron' loses nothing by a tied head"),
        ([prune("svd")], r"method='svd': must be one of \['pca', 'minitron'\]"),
        (
            [{"quantize": {"bits": 8}}, prune("pca")],
            "prune_hidden: layers.0.self_attn.q_proj is stored as .*prune before sparsify and quan",
        ),
        (
            [{"factorize": {"ratio": 0.1, "align": 1, "include": ["gate_proj"]}}, prune("pca", ratio=0.5)],
            "rank 19, above",
        ),
    ],
)
def test_what_cannot_be_stops_before_any_work(tmp_path, tiny, text, stages, message):
    with pytest.raises(ValueError, match=message):
        compress(tiny, recipe_for(text, *stages), tmp_path / "out", progress=False)
    assert not (tmp_path / "out.part").exists()


def test_a_packed_embedding_is_named(tmp_path, text):
    form = {"bits": 8, "group_size": 16}
    save_tiny(tmp_path / "dense", embed_tokens_form=form)
    with pytest.raises(ValueError, match="prune_hidden: embed_tokens_form is stored as int8, groups of 16; prune"):
        compress(tmp_path / "dense", recipe_for(text, prune("minitron")), tmp_path / "out", progress=False)


def test_no_work_file_is_named_in_the_report(tmp_path, tiny, text):
    result = compress(tiny, recipe_for(text, prune("pca")), tmp_path / "out", progress=False)
    assert "tensors" not in json.dumps(result.to_dict())
    assert Recipe.load(tmp_path / "out" / "recipe.yaml").stages[0].method == "pca"
