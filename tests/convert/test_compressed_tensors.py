"""compressed-tensors: what is written, transformers' stock classes read with the package; codes stay bit-equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM
from hf_llmkernel.checkpoint import CheckpointReader
from hf_llmkernel.cli import main
from hf_llmkernel.convert import convert_checkpoint, export_checkpoint
from hf_llmkernel.convert.command import render_export
from hf_llmkernel.convert.compressed_tensors import pack_words, unpack_words
from hf_llmkernel.model.configuration_llm_kernel import LinearForm

from .sources import BASE, PREFIXES, edit_config, hashes, padded_batch, save_stock, stock_model
from .test_outgoing import assert_same_tensors

compressed_tensors = pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")

INT4 = {"bits": 4, "group_size": 16}
INT8 = {"bits": 8, "group_size": 8}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FORMS: dict[str, dict[str, Any]] = {
    "int4 in groups": INT4,
    "int8 in groups": INT8,
    "int4 a row": {"bits": 4},
    "int8 a row": {"bits": 8, "scale_dtype": "float32"},
    "int4 with zero points": {**INT4, "symmetric": False, "scale_dtype": "bfloat16"},
    "int8 with zero points": {**INT8, "symmetric": False},
    "int8 a row with zero points": {"bits": 8, "symmetric": False},
}


def save_packed(folder: Path, forms: dict[str, dict] | None = None, **changes: Any) -> LLMKernelForCausalLM:
    """A random model with packed linears, its weights at fifteen times the usual scale and its zero points mixed."""
    torch.manual_seed(0)
    config = LLMKernelConfig(**{**BASE, "linear_forms": forms or {}, "dtype": "float32", **changes})
    model = LLMKernelForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("zero_points") and not tensor.is_floating_point():
                tensor.random_(3, 13)
            elif "norm" in name:
                tensor.normal_(1.0, 0.3)
    model.save_pretrained(folder)
    return model


def assert_same_output(ours: torch.nn.Module, theirs: torch.nn.Module, tolerance: float = 1e-4) -> None:
    ids, mask = padded_batch("left")
    with torch.no_grad():
        a, b = (model(ids, attention_mask=mask).logits.float() for model in (ours, theirs))
    assert (a.argmax(-1) == b.argmax(-1))[mask.bool()].all()
    assert ((a - b).abs() * mask[..., None]).max() <= tolerance
    assert a.std() > 0.1


def load_theirs(folder: Path, **options: Any) -> torch.nn.Module:
    if "weight_zero_point" in str(CheckpointReader(folder).keys()):
        # On the meta device the package makes zero points of the unpacked shape, so they load by this way alone.
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
def test_the_stock_class_gives_the_same_logits(tmp_path, form):
    ours = save_packed(tmp_path / "ours", dict.fromkeys(LINEARS, FORMS[form]))
    before = hashes(tmp_path / "ours")
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", to="compressed-tensors")
    assert (report.family, report.architecture, report.dtype) == ("llama", "LlamaForCausalLM", "float32")
    assert report.parameters == sum(tensor.numel() for tensor in stock_model("llama").parameters())
    theirs = load_theirs(tmp_path / "out", dtype=torch.float32)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    if FORMS[form].get("symmetric", True):
        assert theirs.model.layers[0].mlp.up_proj.weight_packed.dtype == torch.int32
    assert_same_output(ours, theirs)
    assert hashes(tmp_path / "ours") == before


@pytest.mark.parametrize("form", FORMS)
def test_codes_come_back_bit_equal(tmp_path, form):
    save_packed(tmp_path / "ours", dict.fromkeys(LINEARS, {**FORMS[form], "scale_dtype": "float32"}))
    export_checkpoint(tmp_path / "ours", tmp_path / "out", to="compressed-tensors")
    report = convert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert report.parameters == sum(tensor.numel() for tensor in stock_model("llama").parameters())
    assert_same_tensors(tmp_path / "ours", tmp_path / "back")
    config = LLMKernelConfig.from_pretrained(tmp_path / "back")
    forms = {name: LinearForm.from_dict(form) for name, form in config.linear_forms.items()}
    assert forms == dict.fromkeys(LINEARS, LinearForm(**{**FORMS[form], "scale_dtype": "float32"}))
    assert not config.to_dict().get("per_layer_config") and getattr(config, "quantization_config", None) is None


@pytest.mark.parametrize(("family", "changes"), [
    ("qwen2", {"attention_bias": True, "attention_out_bias": False, "tie_word_embeddings": True}),
    ("qwen3", {"qk_norm": True, "head_dim": 16}),
    ("mistral", {"sliding_window": 7}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
])  # fmt: skip
def test_every_family_is_found(tmp_path, family, changes):
    ours = save_packed(tmp_path / "ours", dict.fromkeys(LINEARS, INT4), **changes)
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", to="compressed-tensors", shard_bytes=20_000)
    assert report.architecture == f"{PREFIXES[family]}ForCausalLM" and len(report.files) > 2
    assert_same_output(ours, load_theirs(tmp_path / "out", dtype=torch.float32))
    convert_checkpoint(tmp_path / "out", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back).__name__ == "LLMKernelForCausalLM"
    assert_same_output(ours, back)


def test_forms_that_differ_are_told_apart(tmp_path):
    int4, int8, row = ({**form, "scale_dtype": "float32"} for form in (INT4, INT8, {"bits": 4}))
    forms = {"q_proj": int8, "k_proj": int8, "v_proj": int8, "down_proj": int4}
    per_layer = {1: {"linear_forms": {"up_proj": int4, "gate_proj": row}}}
    ours = save_packed(tmp_path / "ours", forms, per_layer_config=per_layer)
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", to="compressed-tensors")
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert [len(group["targets"]) for group in quantization["config_groups"].values()] == [6, 3, 1]
    assert "lm_head" in quantization["ignore"] and "model.layers.1.mlp.down_proj" in quantization["ignore"]
    form = {"gate_proj": "int4, one scale a row", "up_proj": "int4, groups of 16"}
    own = ", ".join(f"{name} {words}" for name, words in form.items())
    assert report.notes == [
        f"vLLM will not load this, transformers does: it fuses linears that differ (layer 1: {own})"
    ]
    assert f"Note: {report.notes[0]}." in render_export(report.to_dict()).splitlines()
    assert_same_output(ours, load_theirs(tmp_path / "out", dtype=torch.float32))
    convert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert_same_tensors(tmp_path / "ours", tmp_path / "back")


def test_sparse_ones_are_stored_with_their_zeros(tmp_path):
    forms = {
        "q_proj": {"sparsity": "2:4", **INT4},
        "o_proj": {"sparsity": "bitmask", "nnz": 500, **INT8},
        "down_proj": {"sparsity": "1:4"},
    }
    ours = save_packed(tmp_path / "ours", forms)
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", to="compressed-tensors")
    assert report.notes[0] == "9 sparse matrices are stored with their zeros (layer 0, q_proj: 2:4 sparse int4)"
    theirs = load_theirs(tmp_path / "out", dtype=torch.float32)
    assert_same_output(ours, theirs)
    for name, kept in (("q_proj", 0.5), ("o_proj", 500 / 48**2)):
        weight = getattr(theirs.model.layers[0].self_attn, name).weight
        assert torch.equal(weight, getattr(ours.model.layers[0].self_attn, name).dense_weight())
        assert (weight != 0).float().mean() <= kept


def test_packed_embeddings_are_written_floating(tmp_path):
    changes = {"embed_tokens_form": INT8, "lm_head_form": {**INT4, "symmetric": False}}
    ours = save_packed(tmp_path / "ours", {"up_proj": INT4, "gate_proj": INT4}, **changes)
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", to="compressed-tensors")
    assert [note.split(" is ")[0] for note in report.notes] == ["embed_tokens", "lm_head"]
    theirs = load_theirs(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(theirs.model.embed_tokens.weight, ours.model.embed_tokens.dense_weight())
    assert_same_output(ours, theirs)


@pytest.mark.parametrize(("scale_dtype", "dtype", "written"), [
    ("float16", None, "float16"),
    ("bfloat16", None, "bfloat16"),
    ("float16", "bfloat16", "bfloat16"),
    ("float16", "float32", "float32"),
])  # fmt: skip
def test_the_one_dtype_of_the_format(tmp_path, scale_dtype, dtype, written):
    forms = dict.fromkeys(LINEARS, {**INT4, "scale_dtype": scale_dtype})
    save_packed(tmp_path / "fp32", forms)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path / "ours")
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", to="compressed-tensors", dtype=dtype)
    assert report.dtype == written and len(report.notes) == (written != "bfloat16")
    theirs = load_theirs(tmp_path / "out", dtype="auto")
    assert theirs.dtype == getattr(torch, written)
    scales = theirs.model.layers[2].mlp.down_proj.weight_scale
    assert torch.equal(scales, ours.model.layers[2].mlp.down_proj.scales.to(theirs.dtype))
    if dtype is None:
        assert_same_output(ours.float(), load_theirs(tmp_path / "out", dtype=torch.float32))


def test_what_the_one_dtype_loses_is_counted(tmp_path):
    save_packed(tmp_path / "fp32", dict.fromkeys(LINEARS, {**INT4, "scale_dtype": "float16"}))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    with torch.no_grad():
        ours.model.norm.weight[:3] = torch.tensor([1e-9, 1e-5, 3.0])  # gone, of fewer bits, exact
    ours.save_pretrained(tmp_path / "ours")
    floating = [t for t in load_file(tmp_path / "ours/model.safetensors").values() if t.dtype == torch.bfloat16]
    counts = {"values": 0, "underflowed": 0, "subnormal": 0}
    for value in torch.cat([tensor.flatten() for tensor in floating]).tolist():
        half = float(torch.tensor(value).half())
        counts["values"] += 1
        counts["underflowed"] += half == 0 and value != 0
        counts["subnormal"] += 0 < abs(half) < 2**-14 and half != value
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", to="compressed-tensors")
    assert report.precision == {"dtype": "float16", **counts} and 1 <= counts["underflowed"] < counts["values"]
    said = f"float16: of {counts['values']} values that were cast {counts['underflowed']} underflowed, "
    assert said in render_export(report.to_dict())
    kept = export_checkpoint(tmp_path / "fp32", tmp_path / "kept", to="compressed-tensors", dtype="float32")
    assert kept.precision is None or kept.precision["underflowed"] == 0


def test_every_bit_is_where_the_package_has_it():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    for bits in (4, 8):
        codes = torch.randint(0, 2**bits, (5, 43), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
        signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
        words = pack_words(codes, bits)
        assert torch.equal(words, pack_to_int32(signed, bits))
        assert torch.equal(unpack_words(words, bits, 43), codes)
        assert torch.equal(unpack_from_int32(words, bits, codes.shape), signed)


def save_theirs(folder: Path, weights: dict[str, Any], family: str = "llama", **config: Any) -> torch.nn.Module:
    """A stock folder packed by the package itself, and the stock model with the values that it stands for."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    model = save_stock(folder, family, shards="5GB")
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    bits, symmetric = weights["num_bits"], weights["symmetric"]
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight, stem = tensors.pop(name), name.removesuffix(".weight")
        groups = weight.shape[1] // (weights.get("group_size") or weight.shape[1])
        scale = torch.rand(weight.shape[0], groups, generator=generator) * 0.05 + 0.02
        zeros = torch.randint(-3, 4, scale.shape, generator=generator, dtype=torch.int8) * (not symmetric)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zeros}
        packed = PackedQuantizationCompressor.compress(state, scheme)
        tensors |= {f"{stem}.{key}": value.contiguous() for key, value in packed.items()}
        codes = (weight / scale.repeat_interleave(weight.shape[1] // groups, 1)).round()
        codes += zeros.repeat_interleave(weight.shape[1] // groups, 1)
        codes = codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) - zeros.repeat_interleave(
            weight.shape[1] // groups, 1
        )
        model.state_dict()[name].copy_(codes * scale.repeat_interleave(weight.shape[1] // groups, 1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "sparsity_config": {},
        "kv_cache_scheme": None,
    }
    edit_config(folder, quantization_config={**quantization, **config})
    return model


ARGS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}


@pytest.mark.parametrize("weights", [
    {**ARGS, "actorder": "weight", "observer": "minmax", "dynamic": False},
    {**ARGS, "symmetric": False},
    {**ARGS, "num_bits": 8, "group_size": 8},
    {"num_bits": 8, "symmetric": True, "strategy": "channel", "group_size": None},
    {"num_bits": 8, "symmetric": False, "strategy": "channel", "group_size": None},
])  # fmt: skip
@pytest.mark.parametrize("keep", [None, False])
def test_what_the_package_has_packed(tmp_path, weights, keep):
    theirs = save_theirs(tmp_path / "theirs", weights)
    report = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", keep_integers=keep)
    assert report.family == "llama" and not report.dropped
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert_same_output(ours, theirs)
    forms = LLMKernelConfig.from_pretrained(tmp_path / "ours").linear_forms
    assert set(forms) == (set() if keep is False else set(LINEARS))
    for name, weight in theirs.state_dict().items():
        if name.endswith("up_proj.weight"):
            module = ours.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(module.weight if keep is False else module.dense_weight(), weight)


def test_columns_out_of_order(tmp_path):
    theirs = save_theirs(tmp_path / "theirs", ARGS, **with_weights(actorder="group"))
    path = tmp_path / "theirs/model.safetensors"
    tensors = load_file(path)
    index = torch.arange(48, dtype=torch.int32) // 16
    tensors |= {f"model.layers.{i}.self_attn.q_proj.weight_g_idx": index.clone() for i in range(3)}
    save_file(tensors, path)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ordered")
    assert_same_output(AutoModelForCausalLM.from_pretrained(tmp_path / "ordered").eval(), theirs)

    name = "model.layers.1.self_attn.q_proj"
    shuffled = index[torch.randperm(48, generator=torch.Generator().manual_seed(1))]
    tensors[f"{name}.weight_g_idx"] = shuffled
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"^{name}\.weight_g_idx: puts columns into groups out of .*--dequantize"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", keep_integers=False)
    codes = unpack_words(tensors[f"{name}.weight_packed"], 4, 48).float() - 8
    weight = CheckpointReader(tmp_path / "ours").tensor(f"{name}.weight")
    assert torch.equal(weight, codes * tensors[f"{name}.weight_scale"][:, shuffled.long()])

    tensors[f"{name}.weight_g_idx"] = index - 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"^{name}\.weight_g_idx: is no group of every column"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def with_weights(**changes: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {**ARGS, **changes}}}}


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no groups": ({"config_groups": {}}, r"has no config_groups; fetch this file again"),
    "another format": ({"format": "marlin-24"}, r"group_0 has format 'marlin-24'; the one that is read is 'pack-qu"),
    "bits": (with_weights(num_bits=3), r"group_0 has num_bits=3; what is read is \[4, 8\]"),
    "floats": (with_weights(type="float"), r"group_0 has type='float'; what is read is \['int'\]"),
    "strategy": (with_weights(strategy="tensor", group_size=None), r"group_0 has strategy='tensor'; what is read"),
    "no group size": (with_weights(group_size=None), r"group_0 has strategy='group' with group_size=None; correct it"),
    "unknown": (with_weights(rotation=3), r"group_0 has rotation=3, which is not known"),
    "no weights": ({"config_groups": {"group_0": {"targets": ["Linear"]}}}, r"group_0 has no weights"),
    "targets": ({"config_groups": {"group_0": {"targets": "L", "weights": ARGS}}}, r"has group_0\.targets='L'"),
    "expression": ({"ignore": ["re:(x"]}, r"has 're:\(x' in ignore, which is no expression; correct it"),
    "activations": (
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": ARGS, "input_activations": {"num_bits": 8}}}},
        r"group_0 quantizes input_activations, which is not supported",
    ),
    "cache": ({"kv_cache_scheme": {"num_bits": 8}}, r"has a kv_cache_scheme, which is not supported"),
    "sparsity": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"has a sparsity_config, which is not"),
    "another method": ({"quant_method": "awq"}, r"says the weights are quantized \(awq\)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_CONFIGS)
def test_a_configuration_that_is_not_read(tmp_path, fault):
    changes, message = BAD_CONFIGS[fault]
    save_theirs(tmp_path / "theirs", ARGS, **changes)
    with pytest.raises(ValueError, match=rf"theirs/config\.json: quantization_config {message}") as raised:
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert "\n" not in str(raised.value) and not (tmp_path / "ours").exists()


Q = "model.layers.0.self_attn.q_proj"
PARTS = ("weight_packed", "weight_scale", "weight_shape")
BAD_TENSORS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no scales": (lambda t: t.pop(f"{Q}.weight_scale"), {}, rf"{Q}\.weight_scale: missing in .*fetch all of its"),
    "no shape": (lambda t: t.pop(f"{Q}.weight_shape"), {}, rf"{Q}\.weight_shape: missing in .*though weight_packed is"),
    "no zero points": (lambda t: None, with_weights(symmetric=False), r"weight_zero_point: missing .*symmetric=False"),
    "half the codes": (
        lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][:, :2].contiguous()}),
        {},
        rf"{Q}\.weight_packed: is int32 \[48, 2\] in .*makes it int32 \[48, 6\]; use the config\.json and the weights",
    ),
    "another shape": (
        lambda t: t.update({f"{Q}.weight_shape": torch.tensor([48, 47])}),
        {},
        rf"{Q}: is packed as \[48, 47\], but .*makes it \[48, 48\]; use the config\.json",
    ),
    "scales of another group": (
        lambda t: None,
        with_weights(group_size=8),
        r"weight_scale: is float32 \[48, 5\] .*floating \[48, 10\]",
    ),
    "scales that are not finite": (
        lambda t: t[f"{Q}.weight_scale"].view(-1)[5].fill_(torch.inf),
        {},
        rf"{Q}\.weight_scale: holds an infinity in .*model\.safetensors",
    ),
    "integer scales": (
        lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].long()}),
        {},
        rf"{Q}\.weight_scale: has scales of int64; those that are read are",
    ),
    "a floating linear": (
        lambda t: t.update({f"{Q}.weight": torch.ones(48, 48)}) or [t.pop(f"{Q}.{name}") for name in PARTS],
        {},
        rf"{Q}\.weight: is floating in .* packs it; use the config\.json",
    ),
    "a linear left out": (lambda t: None, {"ignore": ["re:.*q_proj", "lm_head"]}, rf"{Q}\.weight_packed: is packed in"),
    "a layer too many": (
        lambda t: t.update({f"{Q.replace('0', '7')}.{name}": t[f"{Q}.{name}"].clone() for name in PARTS}),
        {},
        r"model\.layers\.7\.self_attn\.q_proj\.\w+: unexpected in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_tensors_that_contradict(tmp_path, fault):
    change, config, message = BAD_TENSORS[fault]
    save_theirs(tmp_path / "theirs", ARGS, **config)
    tensors = load_file(tmp_path / "theirs/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "theirs/model.safetensors")
    with pytest.raises(ValueError, match=message) as raised:
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert "\n" not in str(raised.value) and not (tmp_path / "ours").exists()


OBSTACLES: dict[str, tuple[dict[str, Any], str]] = {
    "low rank": ({"down_proj": {"rank": 8}}, r"layer 0, down_proj: is stored low-rank \(rank 8\), and .*\(2 more like"),
    "groups": ({"up_proj": {"bits": 4, "group_size": 32}}, r"layer 0, up_proj: is stored in groups of 32, of which 48"),
    "zero points": (
        {"up_proj": {**INT4, "symmetric": False, "zero_point_dtype": "float16"}},
        r"layer 0, up_proj: has zero points of float16, and compressed-tensors has integer ones",
    ),
    "nothing": ({}, r"no linear is stored as integers; export to 'llama' instead"),
}  # fmt: skip


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_obstacles_are_named(tmp_path, capfd, obstacle):
    forms, message = OBSTACLES[obstacle]
    save_packed(tmp_path / "ours", forms)
    with pytest.raises(ValueError, match=rf"^to=compressed-tensors: {message}") as raised:
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to="compressed-tensors")
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "compressed-tensors"]) == 2
    assert f"error: {raised.value}" in capfd.readouterr().err.splitlines()
    assert not (tmp_path / "out").exists()


def test_shapes_of_a_layers_own_are_named(tmp_path):
    save_packed(tmp_path / "ours", {"q_proj": INT4}, per_layer_config={1: {"intermediate_size": 64}})
    with pytest.raises(ValueError, match=r"^to=compressed-tensors: layer 1: intermediate_size=64 is its own"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to="compressed-tensors")


@pytest.mark.parametrize("scale", [1e30, 3e4])
def test_a_scale_that_takes_codes_beyond_the_dtype(tmp_path, scale):
    model = save_packed(tmp_path / "ours", {"up_proj": {**INT4, "scale_dtype": "float32"}})
    model.model.layers[1].mlp.up_proj.scales[3, 1] = scale
    model.save_pretrained(tmp_path / "ours")
    message = r"dtype=float16: {} stands for values up to \S+, and the largest number is 65504; choose bfloat16"
    with pytest.raises(ValueError, match=message.format("layer 1, up_proj")):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to="compressed-tensors", dtype="float16")
    assert not (tmp_path / "out").exists()
    export_checkpoint(tmp_path / "ours", tmp_path / "out", to="compressed-tensors")
    with pytest.raises(ValueError, match=message.format(r"model\.layers\.1\.mlp\.up_proj")):
        convert_checkpoint(tmp_path / "out", tmp_path / "back", dtype="float16")
    assert not (tmp_path / "back").exists()


def test_the_commands(tmp_path, capfd):
    save_packed(tmp_path / "ours", {"up_proj": {"sparsity": "2:4", **INT4}})
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "compressed-tensors"]) == 0
    assert "Note: 3 sparse matrices are stored with their zeros" in capfd.readouterr().out
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "kept"), "--json"]) == 0
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "floating"), "--dequantize"]) == 0
    kept, floating = (CheckpointReader(tmp_path / name) for name in ("kept", "floating"))
    assert "model.layers.0.mlp.up_proj.values" in kept and "model.layers.0.mlp.up_proj.weight" in floating
