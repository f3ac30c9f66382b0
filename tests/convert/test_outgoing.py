"""Export: bit-equal to what came in, and what a stock architecture cannot express named by layer and form or field."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM, kernels
from hf_llmkernel.checkpoint import CheckpointReader
from hf_llmkernel.cli import main
from hf_llmkernel.convert import convert_checkpoint, export_checkpoint
from hf_llmkernel.convert.command import parse_size
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
        r"layer 1, down_proj: is stored low-rank \(rank 8\); pass dequantize \(--dequantize\) to write",
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


INT4 = {"bits": 4, "group_size": 16, "symmetric": False}
RANKS = {"rank": 8, "b": INT4}
STAND_FOR: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "integers": (
        "llama",
        {"linear_forms": {"up_proj": INT8, "q_proj": {**INT4, "zero_point_dtype": "float16"}}, "mlp_bias": True},
        ["6 matrices of integers are dequantized (layer 0, q_proj: int4, groups of 16, zero points of float16)"],
    ),
    "integers, tied": (
        "qwen3",
        {"embed_tokens_form": INT4, "tie_word_embeddings": True, "qk_norm": True},
        ["1 matrices of integers are dequantized (embed_tokens: int4, groups of 16, zero points of uint8)"],
    ),
    "integers of a head": (
        "mistral",
        {"lm_head_form": INT8, "sliding_window": 7},
        ["1 matrices of integers are dequantized (lm_head: int8, groups of 16)"],
    ),
    "sparse": (
        "mistral",
        {"linear_forms": {"up_proj": {"sparsity": "2:4"}, "o_proj": {"sparsity": "bitmask", "nnz": 999, "bits": 8}}},
        [
            "3 matrices of integers are dequantized (layer 0, o_proj: sparse (bitmask) int8, one scale a row)",
            "6 sparse matrices are stored with their zeros (layer 0, o_proj: sparse (bitmask) int8, one scale a row)",
        ],
    ),
    "low-rank": (
        "qwen2",
        {"per_layer_config": {1: {"linear_forms": {"q_proj": {"rank": 8}, "down_proj": RANKS}}},
         "attention_bias": True, "attention_out_bias": False},
        ["2 low-rank matrices are multiplied out (layer 1, q_proj: low-rank (rank 8))"],
    ),
}  # fmt: skip


def save_compressed(folder: Path, **changes: Any) -> LLMKernelForCausalLM:
    """A random model whose biases and zero points matter."""
    torch.manual_seed(0)
    model = LLMKernelForCausalLM(LLMKernelConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("zero_points"):
                tensor.copy_(torch.randint(4, 12, tensor.shape) + (0.25 if tensor.is_floating_point() else 0))
            elif name.endswith("bias") or "norm" in name:
                tensor.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.to(model.config.dtype or torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", STAND_FOR)
def test_what_forms_stand_for_goes_out_as_floating_weights(tmp_path, monkeypatch, case, dtype):
    monkeypatch.setattr("hf_llmkernel.convert.own_checkpoint.BLOCK_BYTES", 1000)  # five rows at a time
    family, changes, notes = STAND_FOR[case]
    model = save_compressed(tmp_path / "ours", **changes, dtype=dtype)
    model.save_pretrained(tmp_path / "ours")
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", to=family, dequantize=True)
    assert (report.dtype, report.notes) == (dtype, notes)
    stock, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(stock).__name__ == f"{PREFIXES[family]}ForCausalLM" and not loading["missing_keys"]
    assert report.parameters == sum(parameter.numel() for parameter in stock.parameters())
    ids, mask = padded_batch("left")
    with torch.no_grad(), kernels.disabled():
        ours, theirs = (m(ids, attention_mask=mask).logits.float()[mask.bool()] for m in (model, stock.eval()))
    difference, spread = ours - theirs, ours.std()
    assert difference.abs().max() <= 1e-4 if dtype == "float32" else difference.std() <= 0.02 * spread
    assert spread > 0.1


def test_zeros_stay_and_the_rest_goes_out_bit_equal(tmp_path):
    changes = {"linear_forms": {"up_proj": SPARSE}, "mlp_bias": True}
    model = save_compressed(tmp_path / "ours", **changes, dtype="bfloat16")
    model.save_pretrained(tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "out", to="llama", dequantize=True)
    ours, out = CheckpointReader(tmp_path / "ours"), CheckpointReader(tmp_path / "out")
    for name in out:
        if name.endswith("up_proj.weight"):
            weight, expected = out.tensor(name), model.get_submodule(name.removesuffix(".weight")).dense_weight()
            assert torch.equal(weight, expected) and (weight.view(-1, 4) == 0).sum(-1).min() >= 2
        else:
            assert torch.equal(out.tensor(name), ours.tensor(name)), name


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_only_forms_are_dequantized(tmp_path, obstacle):
    changes, family, message = OBSTACLES[obstacle]
    save_ours(tmp_path / "ours", **changes)
    if "is stored" in message:
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to=family, dequantize=True)
        return
    with pytest.raises(ValueError, match=rf"^to={family}: {message}"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to=family, dequantize=True)
    assert not (tmp_path / "out").exists()


def test_what_a_form_stands_for_beyond_the_dtype(tmp_path):
    model = save_ours(tmp_path / "ours", linear_forms={"up_proj": {**INT8, "scale_dtype": "float32"}})
    model.model.layers[2].mlp.up_proj.scales[3, 1] = 3e4
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"^dtype=float16: model\.layers\.2\.mlp\.up_proj\.weight .* beyond its"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to="llama", dequantize=True, dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["compressed-tensors", "gguf"])
def test_other_formats_have_their_own_ways(tmp_path, capfd, to):
    save_ours(tmp_path / "ours", linear_forms={"up_proj": INT8})
    command = ["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--dequantize", "--to"]
    assert main([*command, to]) == 2
    assert f"error: dequantize: is of ['llama', 'mistral', 'qwen2', 'qwen3'], and to={to};" in capfd.readouterr().err
    assert main([*command, "llama"]) == 0
    assert "Note: 3 matrices of integers are dequantized (layer 0, up_proj: int8" in capfd.readouterr().out


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


def test_sizes_may_have_decimals():
    for size, taken in (("1.5GB", 1_500_000_000), (" 2 mb ", 2_000_000), ("0.5KB", 500), ("7", 7)):
        assert parse_size(size) == taken
    for size in ("0.5", "0", "-1GB", "1e3", "1.GB", "GB", "1GBMB", ""):
        with pytest.raises(ValueError, match="is not a size; give one such as 5GB"):
            parse_size(size)
