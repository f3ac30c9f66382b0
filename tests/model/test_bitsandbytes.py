"""bitsandbytes on load: every class and structure, exact in any order of calls, and what it cannot do is refused.

The references are bitsandbytes' own numbers taken apart: codes, quantile table and scales of the files.
"""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import hf_llmkernel.model.modeling_llm_kernel as modeling
from hf_llmkernel.checkpoint.bitsandbytes import BitsAndBytes
from hf_llmkernel.checkpoint.model_folder import ModelFolder
from hf_llmkernel.cli import main
from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig

bitsandbytes = pytest.importorskip("bitsandbytes")
faulty = pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(), reason="bitsandbytes repacks weights on CPUs with AVX512-BF16 alone"
)

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
# Widths and ranks of single layers, a bias, a skipped sublayer; 64 does not divide the inputs of two linears.
COMPRESSED = {
    "num_hidden_layers": 3,
    "linear_forms": {"q_proj": {"rank": 64}},
    "per_layer_config": {
        1: {
            "intermediate_size": 200,
            "linear_forms": {"up_proj": {"rank": 16}, "down_proj": {"rank": 64, "bias": True}},
        },
        2: {"skip": ["attention"]},
    },
}
ALL_ODD = {"hidden_size": 48, "intermediate_size": 96, "linear_forms": {}, "per_layer_config": {}}
ODD = ["layers.1.mlp.down_proj.a", "layers.1.mlp.up_proj.b"]
SETTINGS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "fp4 fp16": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float16},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
CLASSES = {
    "AutoModel": modeling.LLMKernelModel,
    "AutoModelForCausalLM": modeling.LLMKernelForCausalLM,
    "AutoModelForSequenceClassification": modeling.LLMKernelForSequenceClassification,
    "AutoModelForTokenClassification": modeling.LLMKernelForTokenClassification,
    "AutoModelForQuestionAnswering": modeling.LLMKernelForQuestionAnswering,
}


def written(folder: Path, model_class=modeling.LLMKernelForCausalLM, **changes) -> Path:
    torch.manual_seed(0)
    model_class(LLMKernelConfig(**SMALL | COMPRESSED | changes)).save_pretrained(folder)
    return folder


def quantized(folder: Path, setting: str, auto_class=AutoModelForCausalLM, **arguments):
    config = BitsAndBytesConfig(**SETTINGS[setting])
    return auto_class.from_pretrained(folder, quantization_config=config, **arguments)


def run(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 21).view(2, 9), use_cache=False)[0]


def saved(model, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def decoded(stored: dict[str, torch.Tensor], name: str, shape: tuple[int, int]) -> torch.Tensor:
    """The weight of a 4-bit linear as the paper has it: the code's quantile times its block's scale, block by block."""
    packed = stored[f"{name}.weight"].flatten()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()
    scales = stored[f"{name}.weight.absmax"]
    if scales.dtype == torch.uint8:
        state = json.loads(bytes(stored[f"{name}.weight.quant_state.bitsandbytes__nf4"].tolist()))
        nested = stored[f"{name}.weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(scales)]
        scales = stored[f"{name}.weight.nested_quant_map"][scales.long()] * nested + state["nested_offset"]
    values = stored[f"{name}.weight.quant_map"][codes.long()]
    return (values * scales.repeat_interleave(64)[: len(values)]).view(shape)


@faulty
def test_upstream_repacks_the_weights_of_a_stock_model(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "float")
    before = saved(quantized(tmp_path / "float", "nf4"), tmp_path / "before")
    model = quantized(tmp_path / "float", "nf4")
    run(model)
    assert not same(saved(model, tmp_path / "after"), before)
    model = quantized(tmp_path / "float", "nf4")
    exact = model.model.layers[0].mlp.up_proj
    weight = bitsandbytes.functional.dequantize_4bit(exact.weight.data, exact.weight.quant_state)
    run(model)
    with pytest.raises(Exception):  # noqa: B017 another weight, or the end of it
        repacked = bitsandbytes.functional.dequantize_4bit(exact.weight.data, exact.weight.quant_state)
        torch.testing.assert_close(repacked.float(), weight)


@faulty
def test_upstream_ends_on_shapes_that_32_does_not_divide(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SMALL | {"intermediate_size": 200})).save_pretrained(tmp_path)
    with pytest.raises((AssertionError, RuntimeError)):
        run(quantized(tmp_path, "nf4"))


@pytest.mark.parametrize(
    ("setting", "auto_class"),
    [(setting, "AutoModelForCausalLM") for setting in SETTINGS] + [("nf4", auto_class) for auto_class in CLASSES],
)
def test_exact_in_any_order_of_calls(tmp_path, setting, auto_class):
    auto = getattr(transformers, auto_class)
    folder = written(tmp_path / "float", CLASSES[auto_class])
    model = quantized(folder, setting, auto)
    before = saved(model, tmp_path / "before")
    outputs = run(model)
    model.train().eval()
    assert torch.equal(run(model), outputs)
    assert same(saved(model, tmp_path / "after"), before)
    again = auto.from_pretrained(tmp_path / "after")
    assert torch.equal(run(again), outputs)
    assert same(saved(again, tmp_path / "again"), before)
    linears = modeling.quantized_linears(again)
    assert len(linears) == (20 if setting == "int8" else 18)
    assert not any(name.endswith(("lm_head", "score", "qa_outputs")) for name in linears)


@pytest.mark.parametrize("setting", ["nf4", "nf4 double"])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.a", "model.layers.1.mlp.gate_proj"])
def test_dequantized_weights_are_those_of_the_files_after_a_forward(tmp_path, setting, name):
    model = quantized(written(tmp_path / "float"), setting)
    stored = saved(model, tmp_path / "stored")
    run(model)
    plain = model.dequantize()
    linear = plain.get_submodule(name)
    assert type(linear) is nn.Linear
    expected = decoded(stored, name, (linear.out_features, linear.in_features))
    torch.testing.assert_close(linear.weight, expected, rtol=0, atol=1e-6)
    saved(plain, tmp_path / "plain")
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), run(plain))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_stored_model_that_was_dequantized_is_saved(tmp_path, setting):
    saved(quantized(written(tmp_path / "float"), setting), tmp_path / "stored")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "stored").dequantize()
    saved(plain, tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(again.model.layers[1].mlp.gate_proj) is nn.Linear and torch.equal(run(again), run(plain))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_in_the_dtype_asked_for(tmp_path, compute):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    folder = written(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float16)
    linear = model.model.layers[1].mlp.gate_proj
    stored = saved(model, tmp_path / "stored")
    weight = decoded(stored, "model.layers.1.mlp.gate_proj", (200, 64)).half().to(compute)
    inputs = torch.randn(5, 64, dtype=torch.float16)
    expected = (inputs.to(compute) @ weight.T).half()
    torch.testing.assert_close(linear(inputs), expected, rtol=0, atol=5e-2 if compute == torch.bfloat16 else 4e-3)
    assert linear.compute_dtype == compute


def test_linears_that_would_be_decoded_wrongly_stay_floating_and_are_reported(tmp_path, caplog):
    folder = written(tmp_path / "float")
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        model = quantized(folder, "nf4")
    transformers.logging.disable_propagation()
    assert "2 linears stay torch.float32" in caplog.text and all(name in caplog.text for name in ODD)
    floating = load_file(folder / "model.safetensors")
    for name in ODD:
        assert type(linear := model.get_submodule(f"model.{name}")) is nn.Linear
        assert torch.equal(linear.weight, floating[f"model.{name}.weight"])
    saved(model, tmp_path / "stored")
    skipped = json.loads((tmp_path / "stored/config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert skipped == [*ODD, "lm_head"]


def test_of_many_that_stay_floating_three_are_named_and_kinds_are_counted(tmp_path, caplog):
    changes = {"num_hidden_layers": 4, "linear_forms": {"up_proj": {"rank": 8}, "q_proj": {"rank": 8}}}
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        quantized(written(tmp_path, **changes, per_layer_config={}), "nf4")
    transformers.logging.disable_propagation()
    (said,) = [record.message for record in caplog.records if "linears stay" in record.message]
    assert said.startswith("bitsandbytes: 8 linears stay torch.float32") and said.count("layers.") == 3
    assert said.endswith("… (4 q_proj.b, 4 up_proj.b).")


def test_a_linear_of_one_column_is_not_quantized_to_int8(tmp_path):
    model = quantized(written(tmp_path, linear_forms={"q_proj": {"rank": 1}}), "int8")
    assert type(model.model.layers[0].self_attn.q_proj.b) is nn.Linear
    assert type(model.model.layers[0].self_attn.q_proj.a) is not nn.Linear


def test_a_tied_head_stays_tied_and_a_free_one_is_quantized_where_asked(tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["k_proj"])
    tied = AutoModelForCausalLM.from_pretrained(
        written(tmp_path / "tied", tie_word_embeddings=True), quantization_config=config
    )
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["k_proj"])
    free = AutoModelForCausalLM.from_pretrained(written(tmp_path / "free"), quantization_config=config)
    before = saved(free, tmp_path / "before")
    assert "lm_head.weight.absmax" in before and "model.layers.0.self_attn.k_proj.weight.absmax" not in before
    run(free)
    assert same(saved(free, tmp_path / "after"), before)


def test_a_new_head_on_a_quantized_body_is_floating(tmp_path):
    model = quantized(written(tmp_path / "float"), "nf4")
    saved(model, tmp_path / "stored")
    classifier = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "stored", num_labels=3)
    assert type(classifier.score) is nn.Linear and classifier.score.weight.isfinite().all()
    assert run(classifier).shape == (2, 9, 3)


def test_remote_code_is_as_exact(tmp_path, run_python):
    folder, before = written(tmp_path / "float"), {}
    for setting in ("int8", "nf4"):
        model = quantized(folder, setting)
        before[setting] = saved(model, tmp_path / "before" / setting)
        torch.save(run(model), tmp_path / f"{setting}.pt")
    code = """
import sys
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import torch

def run(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 21).view(2, 9), use_cache=False)[0]

for setting in ("int8", "nf4"):
    asked = BitsAndBytesConfig(
        load_in_8bit=setting == "int8", load_in_4bit=setting == "nf4", bnb_4bit_quant_type="nf4"
    )
    model = AutoModelForCausalLM.from_pretrained("float", quantization_config=asked, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    outputs = run(model)
    model.save_pretrained(f"remote/{setting}")
    again = AutoModelForCausalLM.from_pretrained(f"remote/{setting}", trust_remote_code=True)
    assert torch.equal(run(again), outputs) and torch.equal(outputs, torch.load(f"{setting}.pt"))
"""
    run_python(code, package=False, OMP_NUM_THREADS="1")
    for setting, tensors in before.items():
        assert same(load_file(tmp_path / "remote" / setting / "model.safetensors"), tensors)


def test_the_payload_loads_where_bitsandbytes_is_not_installed(tmp_path, run_python):
    written(tmp_path / "float")
    code = """
sys.modules["bitsandbytes"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).train().eval()
"""
    run_python(code, str(tmp_path / "float"), package=False)


def test_modules_put_in_by_hand_are_guarded_too(tmp_path):
    from transformers.integrations import replace_with_bnb_linear

    model = modeling.LLMKernelForCausalLM(LLMKernelConfig(**SMALL))
    config = BitsAndBytesConfig(**SETTINGS["nf4"])
    replace_with_bnb_linear(model, ["lm_head"], config)
    assert not any(linear.support_avx512bf16_for_cpu for linear in modeling.quantized_linears(model.eval()).values())
    narrow = bitsandbytes.nn.Linear4bit(16, 128, bias=False, device="cpu")
    model.model.layers[0].mlp.up_proj = narrow
    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj: in_features=16"):
        model.eval()


@pytest.fixture(scope="module", params=["int8", "nf4", "nf4 double"])
def stored(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    quantized(written(folder / "float"), request.param).save_pretrained(folder / "quantized")
    return folder / "quantized", request.param


UP = "model.layers.0.mlp.up_proj"


def scale_name(setting: str) -> str:
    return {"int8": f"{UP}.SCB", "nf4": f"{UP}.weight.absmax"}.get(setting, f"{UP}.weight.nested_absmax")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda tensors, name: tensors.pop(name), "missing"),
        (lambda tensors, name: tensors[name].fill_(float("nan")), "not finite"),
        (lambda tensors, name: tensors.pop(f"{UP}.weight"), f"{UP}.weight: missing"),
        (
            lambda tensors, name: tensors.update({f"{UP}.weight": torch.zeros(128, 64)}),
            f"{UP}.weight: is stored as F32",
        ),
        (lambda tensors, name: tensors.update({f"{UP}.weight": tensors[f"{UP}.weight"][:-8].clone()}), "another shape"),
    ],
)
def test_damaged_tensors_are_named(stored, tmp_path, damage, fault):
    folder, setting = stored
    copied = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copied / "model.safetensors")
    damage(tensors, scale_name(setting))
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{UP}.*{fault}|{fault}"):
        AutoModelForCausalLM.from_pretrained(copied)


STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"


def state_of(content: bytes) -> torch.Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


def with_fields(**fields):
    """A state with other fields; `None` leaves one out."""

    def damage(tensors):
        said = {**json.loads(bytes(tensors[STATE].tolist())), **fields}
        kept = {name: value for name, value in said.items() if value is not None}
        tensors[STATE] = state_of(json.dumps(kept).encode())

    return damage


def as_type(suffix: str, dtype: torch.dtype):
    return lambda tensors: tensors.update({f"{UP}.{suffix}": tensors[f"{UP}.{suffix}"].to(dtype)})


def other_values(suffix: str):
    """One value of a table changed, still in order."""

    def damage(tensors):
        tensors[f"{UP}.{suffix}"][5] += 1e-3

    return damage


def shortened(suffix: str):
    return lambda tensors: tensors.update({f"{UP}.{suffix}": tensors[f"{UP}.{suffix}"][:-1].clone()})


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda tensors: tensors.update({STATE: state_of(bytes(range(128, 206)))}), f"{STATE}: is no JSON object"),
        (lambda tensors: tensors.update({STATE: tensors[STATE][:40].clone()}), f"{STATE}: is no JSON object"),
        (lambda tensors: tensors.update({STATE: state_of(b"")}), f"{STATE}: is no JSON object"),
        (lambda tensors: tensors.update({STATE: state_of(b"[64]")}), f"{STATE}: is no JSON object"),
        (lambda tensors: tensors.update({STATE: torch.zeros(78)}), f"{STATE}: is no JSON object"),
        (lambda tensors: tensors.pop(STATE), f"{STATE}: missing"),
        (with_fields(quant_type="fp4"), f"{STATE}: quant_type='fp4' is not nf4"),
        (with_fields(blocksize=None), f"{STATE}: blocksize=None is not 32 or 64"),
        (with_fields(blocksize=128), f"{UP}.weight.absmax: has 128 values, not the 64 of its linear"),
        (with_fields(dtype="int3"), f"{STATE}: dtype='int3' is not float32 or bfloat16"),
        (with_fields(shape=[64, 128]), f"{STATE}: shape=[64, 128] is not [128, 64]"),
        (shortened("weight.absmax"), f"{UP}.weight.absmax: has 127 values, not the 128 of its linear"),
        (shortened("weight.quant_map"), f"{UP}.weight.quant_map: has 15 values, not the 16 of its linear"),
        (lambda tensors: tensors.pop(f"{UP}.weight.absmax"), f"{UP}.weight.absmax: missing"),
        (lambda tensors: tensors.pop(f"{UP}.weight.quant_map"), f"{UP}.weight.quant_map: missing"),
        (as_type("weight.absmax", torch.int8), f"{UP}.weight.absmax: is stored as I8, and bitsandbytes has "),
        (as_type("weight.quant_map", torch.float16), f"{UP}.weight.quant_map: is stored as F16, and bits"),
        (other_values("weight.quant_map"), f"{UP}.weight.quant_map: has other values than those its codes stand for"),
    ],
)
@pytest.mark.parametrize("stored", ["nf4", "nf4 double"], indirect=True)
def test_a_damaged_state_of_four_bits_is_named_in_one_line(stored, tmp_path, damage, fault):
    refused(stored[0], tmp_path / "copy", damage, fault)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (with_fields(nested_blocksize=128), f"{STATE}: nested_blocksize=128 is not 256"),
        (with_fields(nested_dtype=None), f"{STATE}: nested_dtype=None is not float32"),
        (with_fields(nested_offset=float("nan")), f"{STATE}: nested_offset=nan is no finite number"),
        (shortened("weight.nested_quant_map"), f"{UP}.weight.nested_quant_map: has 255 values, not the 256"),
        (other_values("weight.nested_quant_map"), f"{UP}.weight.nested_quant_map: has other values than those"),
        (as_type("weight.nested_absmax", torch.float16), f"{UP}.weight.nested_absmax: is stored as F16, and bits"),
        (lambda tensors: tensors.pop(f"{UP}.weight.nested_absmax"), f"{UP}.weight.nested_absmax: missing"),
    ],
)
@pytest.mark.parametrize("stored", ["nf4 double"], indirect=True)
def test_a_damaged_state_of_scales_in_eight_bits_is_named_in_one_line(stored, tmp_path, damage, fault):
    refused(stored[0], tmp_path / "copy", damage, fault)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (shortened("SCB"), f"{UP}.SCB: has 127 values, not the 128 of its linear"),
        (as_type("SCB", torch.float16), f"{UP}.SCB: is stored as F16, and bitsandbytes has F32"),
        (lambda tensors: tensors.pop(f"{UP}.SCB"), f"{UP}.SCB: missing"),
    ],
)
@pytest.mark.parametrize("stored", ["int8"], indirect=True)
def test_damaged_scales_of_int8_are_named(stored, tmp_path, damage, fault):
    refused(stored[0], tmp_path / "copy", damage, fault)


def refused(folder: Path, copied: Path, damage, fault: str) -> None:
    """Loaded as a model or walked over block by block, damaged tensors end with the same line."""
    shutil.copytree(folder, copied)
    tensors = load_file(copied / "model.safetensors")
    damage(tensors)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"^{re.escape(fault)}") as error:
        AutoModelForCausalLM.from_pretrained(copied)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"^{re.escape(fault.removeprefix('model.'))}"):
        ModelFolder(copied).block(0)


def other_bits(config: dict) -> dict:
    four = config["quantization_config"]["load_in_4bit"]
    return BitsAndBytesConfig(load_in_4bit=not four, load_in_8bit=four).to_dict()


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda config: config.pop("quantization_config"), "is stored as (I8|U8)"),
        (
            lambda config: config["quantization_config"].update(llm_int8_skip_modules=["lm_head", "up_proj"]),
            "is stored as (I8|U8)",
        ),
        (lambda config: config.update(num_key_value_heads=1), r"k_proj.*(is not \[16, 64\]|not the 16 of)"),
        (lambda config: config.update(quantization_config=other_bits(config)), "is stored as (I8|U8)"),
    ],
)
def test_a_configuration_of_other_weights_never_loads_integers_as_floats(stored, tmp_path, edit, fault):
    copied = shutil.copytree(stored[0], tmp_path / "copy")
    config = json.loads((copied / "config.json").read_text())
    edit(config)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=fault):
        AutoModelForCausalLM.from_pretrained(copied)


def test_encoded_weights_without_a_configuration_are_not_walked_over(stored, tmp_path):
    copied = shutil.copytree(stored[0], tmp_path / "copy")
    config = json.loads((copied / "config.json").read_text())
    for changes in ({}, {"quantization_config": {"quant_method": "bitsandbytes"}}):
        config.pop("quantization_config", None)
        config.update(changes)
        (copied / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="is stored as bitsandbytes does, and config.json does not ask for that"):
            ModelFolder(copied)


@pytest.mark.parametrize(
    "settings",
    [
        {"bnb_4bit_compute_dtype": "float8_e4m3fn"},
        {"bnb_4bit_compute_dtype": "no such"},
        {"bnb_4bit_compute_dtype": 3},
        {"bnb_4bit_quant_type": "nf5"},
        {"bnb_4bit_use_double_quant": "yes"},
        {"load_in_8bit": True},
        {"llm_int8_threshold": "a"},
        {"llm_int8_skip_modules": "up_proj"},
    ],
)
@pytest.mark.parametrize("stored", ["nf4"], indirect=True)
def test_settings_of_a_checkpoint_that_mean_nothing_are_named(stored, tmp_path, settings, capfd):
    copied = shutil.copytree(stored[0], tmp_path / "copy")
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"].update(settings)
    (copied / "config.json").write_text(json.dumps(config))
    fault = rf"quantization_config: .*{next(iter(settings))}"
    for load in (AutoModelForCausalLM.from_pretrained, ModelFolder):
        with pytest.raises(ValueError, match=f"^{fault}"):
            load(copied)
    assert main(["inspect", str(copied)]) == 2
    assert re.search(rf"^error: .*{fault}", capfd.readouterr().err)


@pytest.mark.parametrize("stored", ["nf4"], indirect=True)
def test_settings_that_a_checkpoint_leaves_out_are_those_of_transformers(stored, tmp_path):
    copied = shutil.copytree(stored[0], tmp_path / "copy")
    config = json.loads((copied / "config.json").read_text())
    said = config["quantization_config"]
    needed = ("load_in_4bit", "bnb_4bit_quant_type", "llm_int8_skip_modules")
    config["quantization_config"] = {name: said[name] for name in needed}
    (copied / "config.json").write_text(json.dumps(config))
    loaded, expected = (run(AutoModelForCausalLM.from_pretrained(folder)) for folder in (copied, stored[0]))
    assert torch.equal(loaded, expected)
    assert ModelFolder(copied).quantization == BitsAndBytes("nf4", skipped=tuple(said["llm_int8_skip_modules"]))


@pytest.mark.parametrize(
    "asked",
    [{"bnb_4bit_quant_type": "int4"}, {"bnb_4bit_compute_dtype": "int8"}, {"bnb_4bit_compute_dtype": "float64"}],
)
def test_settings_that_end_with_an_error_later_are_refused_at_load(tmp_path, asked):
    config = BitsAndBytesConfig(load_in_4bit=True, **asked)
    with pytest.raises(ValueError, match=f"quantization_config: {next(iter(asked))}="):
        AutoModelForCausalLM.from_pretrained(written(tmp_path), quantization_config=config)


@pytest.mark.parametrize(
    ("setting", "asked", "message"),
    [
        ("nf4", {"load_in_8bit": True}, "asks for int8, and the checkpoint is stored as nf4; leave it out"),
        ("int8", SETTINGS["nf4"], "asks for nf4, and the checkpoint is stored as int8"),
        ("nf4", SETTINGS["nf4 double"], "asks for nf4 with double quantization, and the checkpoint is stored as nf4"),
        ("nf4 double", {"load_in_4bit": True}, "asks for fp4, and the checkpoint is stored as nf4 with double"),
    ],
)
def test_quantized_weights_are_not_quantized_in_another_way(tmp_path, setting, asked, message):
    saved(quantized(written(tmp_path / "float"), setting), tmp_path / "stored")
    asked = BitsAndBytesConfig(**asked)
    for load in (AutoModelForCausalLM.from_pretrained, modeling.LLMKernelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"^quantization_config: {message}"):
            load(tmp_path / "stored", quantization_config=asked)


@pytest.mark.parametrize("changes", [{}, {"bnb_4bit_compute_dtype": torch.bfloat16}])
def test_the_same_quantization_is_asked_for_again(tmp_path, changes):
    before = saved(quantized(written(tmp_path / "float"), "nf4"), tmp_path / "stored")
    asked = BitsAndBytesConfig(**SETTINGS["nf4"], **changes)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", quantization_config=asked)
    assert same(saved(again, tmp_path / "again"), before)


def test_quantizing_nothing_is_refused_on_load(tmp_path):
    folder = written(tmp_path, **ALL_ODD)
    odd = r"4 bits take in_features that 64 divides, .* model.layers.0.self_attn.q_proj, .*v_proj, … \(3 q_proj, 3 k_"
    with pytest.raises(ValueError, match=f"quantization_config: quantizes nothing, for {odd}"):
        quantized(folder, "nf4")
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["model", "lm_head"])
    with pytest.raises(ValueError, match="quantizes nothing, for modules that are not to be converted are all there"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_what_has_nothing_quantized_is_not_dequantized(tmp_path):
    folder = written(tmp_path, **ALL_ODD)
    config = json.loads((folder / "config.json").read_text())
    everything = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["model", "lm_head"])
    config["quantization_config"] = everything.to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="dequantize: no linear of this model is quantized"):
        model.dequantize()


def test_the_cast_of_inputs_is_told_once_and_all_else_always(tmp_path, caplog):
    model = quantized(written(tmp_path, dtype="bfloat16"), "int8", dtype=torch.bfloat16)
    modeling.CAST_FILTER.given = False
    with caplog.at_level(logging.WARNING, modeling.CAST_LOGGER):
        run(model)
        run(model)
        logging.getLogger(modeling.CAST_LOGGER).warning("another")
    assert sum("inputs will be cast" in record.message for record in caplog.records) == 1
    assert caplog.records[-1].message == "another"


def test_integers_are_not_quantized_again(tmp_path):
    folder = written(tmp_path, linear_forms={"k_proj": {"bits": 8, "group_size": 32}})
    with pytest.raises(ValueError, match="quantization_config: layers.0.k_proj is already stored"):
        quantized(folder, "nf4")
