"""Export: bit-equal to what came in, and what a stock architecture cannot express named by layer and form or field."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM
from hf_llmkernel.checkpoint import CheckpointReader
from hf_llmkernel.cli import main
from hf_llmkernel.convert import convert_checkpoint, export_checkpoint
from hf_llmkernel.convert.families import describe_form
from hf_llmkernel.model.configuration_llm_kernel import LinearForm

from .sources import BASE, CASES, PREFIXES, edit_config, hashes, padded_batch, save_stock
from .test_incoming import HEADS, write_tokenizer


def assert_same_tensors(first: Path, second: Path) -> None:
    a, b = CheckpointReader(first), CheckpointReader(second)
    assert set(a.keys()) == set(b.keys())
    for name in a:
        assert a.dtype(name) == b.dtype(name) and torch.equal(a.tensor(name), b.tensor(name)), name


def meaning(folder: Path) -> dict[str, Any]:
    """A stock configuration without what has no effect: where it lay and what wrote it."""
    config = AutoConfig.from_pretrained(folder)
    fields = config.to_dict()
    fields.setdefault("head_dim", config.hidden_size // config.num_attention_heads)
    for name in ("_name_or_path", "transformers_version"):
        fields.pop(name, None)
    return fields


@pytest.mark.parametrize("case", CASES)
def test_what_came_in_goes_out_bit_equal(tmp_path, case):
    family, changes = CASES[case]
    stock = save_stock(tmp_path / "source", family, **changes)
    # The one family whose tokenizer class overrules what the files declare.
    write_tokenizer(tmp_path / "source", **({"tokenizer_class": "Qwen2Tokenizer"} if family == "qwen2" else {}))
    convert_checkpoint(tmp_path / "source", tmp_path / "ours")
    before = hashes(tmp_path / "ours")
    report = export_checkpoint(tmp_path / "ours", tmp_path / "back", to=family)
    assert report.architecture == type(stock).__name__
    assert_same_tensors(tmp_path / "source", tmp_path / "back")
    assert meaning(tmp_path / "source") == meaning(tmp_path / "back")
    assert hashes(tmp_path / "ours") == before
    source, back = hashes(tmp_path / "source"), hashes(tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert source[name] == back[name]
    assert not list((tmp_path / "back").glob("*.py"))
    loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(loaded) is type(stock) and not loading["missing_keys"] and not loading["unexpected_keys"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", PREFIXES)
def test_every_head_goes_out_bit_equal(tmp_path, family, head):
    suffix, auto_class, _ = HEADS[head]
    save_stock(tmp_path / "source", family, head=suffix)
    convert_checkpoint(tmp_path / "source", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", to=family)
    assert_same_tensors(tmp_path / "source", tmp_path / "back")
    loaded = getattr(transformers, auto_class).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(loaded[0]).__name__ == PREFIXES[family] + suffix and not loaded[1]["missing_keys"]


def test_bfloat16_and_shards_stay(tmp_path):
    save_stock(tmp_path / "source", dtype="bfloat16")
    convert_checkpoint(tmp_path / "source", tmp_path / "ours", dtype="bfloat16")
    report = export_checkpoint(tmp_path / "ours", tmp_path / "back", to="llama", shard_bytes=40_000)
    assert report.dtype == "bfloat16" and len(report.files) > 2
    assert_same_tensors(tmp_path / "ours", tmp_path / "back")


def save_ours(folder: Path, **changes: Any) -> LLMKernelForCausalLM:
    torch.manual_seed(0)
    model = LLMKernelForCausalLM(LLMKernelConfig(**{**BASE, **changes})).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_trained_model_of_this_family_goes_out_with_equal_logits(tmp_path, family):
    model = save_ours(tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "out", to=family)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(stock).__name__ == f"{PREFIXES[family]}ForCausalLM"
    ids, mask = padded_batch("left")
    with torch.no_grad():
        difference = (stock(ids, attention_mask=mask).logits - model(ids, attention_mask=mask).logits).abs()
    assert (difference * mask[..., None]).max() <= 1e-4


INT8 = {"bits": 8, "group_size": 16}
LOW_RANK = {"rank": 8}
SPARSE = {"sparsity": "2:4", "bits": 4, "group_size": 16}
OBSTACLES: dict[str, tuple[dict[str, Any], str, str]] = {
    "integers": ({"linear_forms": {"up_proj": INT8}}, "llama", r"layer 0, up_proj: is stored int8 \(2 more like it\)"),
    "one layer's rank": (
        {"per_layer_config": {1: {"linear_forms": {"down_proj": LOW_RANK}}}},
        "llama",
        r"layer 1, down_proj: is stored low-rank \(rank 8\); export a checkpoint without it",
    ),
    "sparse integers": (
        {"per_layer_config": {2: {"linear_forms": {"q_proj": SPARSE}}}},
        "mistral",
        r"layer 2, q_proj: is stored 2:4 sparse int4; ",
    ),
    "a packed embedding": ({"embed_tokens_form": INT8}, "llama", r"embed_tokens: is stored int8; "),
    "a packed head": ({"lm_head_form": INT8}, "llama", r"lm_head: is stored int8; "),
    "a layer's width": (
        {"per_layer_config": {1: {"intermediate_size": 64}}},
        "llama",
        r"layer 1: intermediate_size=64 is its own, and all layers of llama are alike; ",
    ),
    "a layer's heads": (
        {"per_layer_config": {2: {"num_attention_heads": 4}}},
        "qwen3",
        r"layer 2: num_attention_heads=4 is its own",
    ),
    "a layer left out": ({"per_layer_config": {0: {"skip": ["mlp"]}}}, "llama", r"layer 0: skip=\['mlp'\] is its own"),
    "sublayers left out": ({"skip": ["mlp"]}, "llama", r"all layers: skip=\['mlp'\] leaves out what every llama"),
    "one bias": (
        {"per_layer_config": {1: {"linear_forms": {"q_proj": {"bias": True}}}}},
        "llama",
        r"layer 1, q_proj: bias=True is its own",
    ),
    "norms of queries and keys": ({"qk_norm": True}, "llama", r"all layers: qk_norm=True, and llama has False"),
    "no such norms": ({"attention_bias": False}, "qwen3", r"all layers: qk_norm=False, and qwen3 has True"),
    "biases": ({"attention_bias": True}, "mistral", r"all layers: attention_bias=True, and mistral has False"),
    "no biases": ({}, "qwen2", r"all layers: attention_bias=False, and qwen2 has True"),
    "a bias of the output": (
        {"attention_bias": True, "attention_out_bias": False},
        "llama",
        r"all layers: attention_out_bias=False, and llama has True",
    ),
    "biases of the feed-forward": ({"mlp_bias": True}, "mistral", r"all layers: mlp_bias=True, and mistral has False"),
    "an ungated feed-forward": ({"mlp_gated": False}, "llama", r"all layers: mlp_gated=False, and llama has True"),
    "a window": ({"sliding_window": 8}, "llama", r"layer 0: layer_types says 'sliding_attention', and llama slides"),
    "some windows": (
        {"sliding_window": 8, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        "mistral",
        r"layer 2: layer_types says 'sliding_attention', and mistral slides in all layers or in none",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_obstacles_are_named(tmp_path, obstacle):
    changes, family, message = OBSTACLES[obstacle]
    save_ours(tmp_path / "ours", **changes)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match=rf"^to={family}: {message}") as raised:
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to=family)
    assert "\n" not in str(raised.value)
    assert hashes(tmp_path) == before


def test_heads_that_llama_alone_refuses(tmp_path):
    save_ours(tmp_path / "ours", num_attention_heads=5, num_key_value_heads=1, head_dim=8)
    with pytest.raises(ValueError, match=r"^to=llama: .*hidden size.*; export to another of \['llama', 'mistral'"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to="llama")
    assert export_checkpoint(tmp_path / "ours", tmp_path / "out", to="mistral").family == "mistral"


def test_bad_input(tmp_path, capfd):
    save_stock(tmp_path / "stock")
    save_ours(tmp_path / "ours")
    for model, target, message in (
        ("ours", "gpt5", r"to='gpt5': is not one of \['llama', 'mistral', 'qwen2', 'qwen3', 'compressed-tensors'"),
        ("stock", "llama", r"stock/config\.json: model_type='llama' is not 'llm_kernel'; give a folder"),
        ("missing", "llama", r"missing/config\.json: missing; give the folder"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            export_checkpoint(tmp_path / model, tmp_path / "out", to=target)
        assert main(["export", str(tmp_path / model), str(tmp_path / "out"), "--to", target]) == 2
        assert f"error: {raised.value}" in capfd.readouterr().err.splitlines()
    edit_config(tmp_path / "ours", linear_forms={"q_proj": {"color": "red"}})
    with pytest.raises(ValueError, match=r"ours/config\.json: .*unknown keys \['color'\]"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to="llama")
    assert not (tmp_path / "out").exists()


def test_forms_in_words():
    words = {
        "dense": {},
        "int4": {"bits": 4},
        "sparse (bitmask) int8": {"sparsity": "bitmask", "nnz": 3, "bits": 8},
        "2:4 sparse": {"sparsity": "2:4"},
        "low-rank (rank 3)": {"rank": 3},
    }
    assert {describe_form(LinearForm.from_dict(form)): form for form in words.values()} == words


def test_the_command(tmp_path, capfd):
    save_stock(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "ours"), "--dtype", "bfloat16", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["dtype"] == "bfloat16" and report["family"] == "llama" and report["files"] == ["model.safetensors"]
    sizes = ["--max-shard-size", "30KB"]
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "llama", *sizes]) == 0
    shown = capfd.readouterr()
    assert "LlamaForCausalLM" in shown.out and "has no tokenizer" in shown.out and "exporting" in shown.err
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "x"), "--max-shard-size", "big"]) == 2
    assert "error: max_shard_size=big: is not a size; give one such as 5GB" in capfd.readouterr().err
