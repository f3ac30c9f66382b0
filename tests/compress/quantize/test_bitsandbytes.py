"""The stage `bitsandbytes`: what it writes is what transformers makes of the same model on load, bit for bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_llmkernel import compress, export_checkpoint, inspect
from hf_llmkernel.checkpoint.bitsandbytes import BitsAndBytes
from hf_llmkernel.checkpoint.model_folder import ModelFolder
from hf_llmkernel.compress.plan import plan_stages, stored_sizes
from hf_llmkernel.compress.recipe import Recipe
from hf_llmkernel.evaluate.quality import perplexity, streamed_perplexity
from tests.compress.conftest import save_tiny

pytest.importorskip("bitsandbytes")

RANKS = {"factorize": {"ratio": 0.3, "align": 16, "method": "svd", "include": ["up_proj"]}}
SETTINGS = {
    "int8": {"quant_type": "int8"},
    "nf4": {},
    "fp4 double": {"quant_type": "fp4", "double_quant": True, "compute_dtype": "float16"},
    "restricted": {"exclude": ["q_proj", "up_proj.a"], "layers": [0, 2]},
}
WINDOWS = torch.arange(96).view(3, 32) % 90


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of which 64 divides some inputs, and the same with a low-rank linear in every layer."""
    folder = tmp_path_factory.mktemp("source")
    save_tiny(folder / "dense", hidden_size=64, intermediate_size=96, attention_bias=True)
    compress(folder / "dense", {"dtype": "bfloat16", "stages": [RANKS]}, folder / "ranks", progress=False)
    return folder


@pytest.fixture(scope="module", params=SETTINGS)
def written(request, source, tmp_path_factory):
    output = tmp_path_factory.mktemp("written") / "output"
    recipe = {"dtype": "bfloat16", "stages": [RANKS, {"bitsandbytes": SETTINGS[request.param]}]}
    return request.param, output, compress(source / "dense", recipe, output, progress=False)


def test_tensors_are_those_of_a_model_quantized_on_load(written, source, tmp_path):
    _, output, _ = written
    asked = json.loads((output / "config.json").read_text())["quantization_config"]
    model = AutoModelForCausalLM.from_pretrained(
        source / "ranks", quantization_config=BitsAndBytesConfig.from_dict(asked)
    )
    model.save_pretrained(tmp_path)
    expected, tensors = load_file(tmp_path / "model.safetensors"), load_file(output / "model.safetensors")
    assert expected.keys() == tensors.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype, name


def test_linears_are_chosen_as_everywhere_and_odd_ones_stay_floating(written):
    setting, output, result = written
    (entry,) = result.stages[-1]["result"]
    quantized = {
        "int8": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj.a", "up_proj.b", "down_proj"],
        "restricted": ["k_proj", "v_proj", "o_proj", "gate_proj"],
    }.get(setting, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj.a"])
    assert entry["matrices"] == quantized
    assert entry.get("stay_floating", []) == ([] if setting == "int8" else ["up_proj.b", "down_proj"])
    names = load_file(output / "model.safetensors").keys()
    layers = [0, 1] if setting == "restricted" else [0, 1, 2]
    mark = ".SCB" if setting == "int8" else ".weight.absmax"
    assert sum(name.endswith(mark) for name in names) == len(quantized) * len(layers)


def test_bytes_are_as_claimed(written):
    setting, output, result = written
    claimed = stored_sizes(ModelFolder(output).config, torch.bfloat16)[1]
    states = 18 if setting == "fp4 double" else 0  # of whose lengths a few digits depend on the weights
    assert abs(claimed - result.weight_bytes) <= 5 * states
    assert inspect(output, progress=False).bytes == result.weight_bytes


def test_perplexity_block_by_block_is_that_of_the_loaded_model(written):
    _, output, _ = written
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} == {torch.float32}
    loaded = perplexity(model, WINDOWS, progress=False)
    assert streamed_perplexity(output, WINDOWS, progress=False).window_nlls == loaded.window_nlls


def test_the_inventory_names_forms_and_finds_other_tensors(written):
    setting, output, _ = written
    forms = {entry.name: entry.form for entry in inspect(output, verify=True, progress=False).entries}
    name = {"int8": "bnb int8", "fp4 double": "bnb fp4 double"}.get(setting, "bnb nf4")
    assert forms["model.layers.0.self_attn.k_proj"] == name
    assert forms["model.embed_tokens"] == "dense bfloat16"
    factors = {"int8": f"{name}, {name}", "restricted": "dense bfloat16, dense bfloat16"}
    assert forms["model.layers.0.mlp.up_proj"] == f"rank 32 ({factors.get(setting, f'{name}, dense bfloat16')})"
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    with pytest.raises(ValueError, match="layers.0.self_attn.(q|k)_proj"):
        inspect(output, progress=False)
    (output / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        ([{"bitsandbytes": {}}, {"quantize": {"bits": 8}}], "quantize: comes after the stage bitsandbytes"),
        ([{"bitsandbytes": {}}, {"bitsandbytes": {}}], "bitsandbytes: comes after the stage bitsandbytes"),
        (
            [{"quantize": {"bits": 8, "include": ["k_proj"]}}, {"bitsandbytes": {}}],
            "bitsandbytes: layers.0.self_attn.k_proj is stored as int8, groups of 64; start",
        ),
        (
            [{"quantize": {"bits": 8, "include": ["k_proj"], "layers": [0, 1]}}, {"bitsandbytes": {"layers": [1, 3]}}],
            "bitsandbytes: layers.0.k_proj is sparse or integer",
        ),
        (
            [
                {"quantize": {"bits": 8, "layers": [0, 1], "include": ["k_proj"], "embeddings": True}},
                {"bitsandbytes": {"layers": [1, 3]}},
            ],
            "bitsandbytes: embed_tokens is sparse or integer",
        ),
        ([{"search": {"choices": [[], [{"bitsandbytes": {}}]], "bytes": 0.5}}], "bitsandbytes is the last stage"),
        ([{"bitsandbytes": {"quant_type": "int4"}}], "quant_type='int4': must be one of"),
        ([{"bitsandbytes": {"quant_type": "int8", "double_quant": True}}], "quant_type='int8': double_quant"),
        ([{"bitsandbytes": {"double_quant": 1}}], "double_quant=1: must be true or false"),
        ([{"bitsandbytes": {"compute_dtype": "int8"}}], "compute_dtype='int8': must be one of"),
        ([{"bitsandbytes": {"embeddings": True}}], "embeddings=true: this stage works on the blocks alone"),
        ([{"bitsandbytes": {"exclude": ["w_proj"]}}], "'w_proj' matches no linear"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(source, tmp_path, text, stages, fault):
    recipe = {"calibration": {"source": str(text)}, "stages": stages}
    with pytest.raises(ValueError, match=fault):
        compress(source / "dense", recipe, tmp_path / "output", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_quantized_checkpoint_is_not_compressed_again(written, tmp_path):
    with pytest.raises(ValueError, match="quantize: the checkpoint is quantized already .bitsandbytes"):
        compress(written[1], {"stages": [{"quantize": {"bits": 4}}]}, tmp_path / "o")


@pytest.mark.parametrize("to", ["llama", "compressed-tensors", "gguf"])
def test_a_quantized_checkpoint_is_not_exported(written, tmp_path, to):
    with pytest.raises(ValueError, match="config.json: the linears are stored as bitsandbytes"):
        export_checkpoint(written[1], tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"quant_type": "int8"}, {"compute_dtype": "float16"}])
def test_weights_beyond_what_it_computes_in_are_refused(source, tmp_path, settings):
    name, file = "model.layers.1.self_attn.v_proj", tmp_path / "source/model.safetensors"
    shutil.copytree(source / "dense", tmp_path / "source")
    tensors = load_file(file)
    tensors[f"{name}.weight"][2, 3] = 1e5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"bitsandbytes: {name} has values up to 1e\+05, .* float16, .* 65504; "):
        compress(tmp_path / "source", {"stages": [{"bitsandbytes": settings}]}, tmp_path / "output", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_plan_is_in_bytes(source):
    stages = Recipe.load({"stages": [{"bitsandbytes": {"exclude": ["down_proj"]}}]}).stages
    before = ModelFolder(source / "dense").config
    (planned,) = plan_stages(before, stages, torch.bfloat16)
    assert BitsAndBytes.of(planned.config).compute_dtype == "bfloat16"
    values = 3 * (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 2)
    saved = stored_sizes(before, torch.bfloat16)[1] - planned.weight_bytes
    beside = values / 64 * 4 + 3 * 6 * (16 * 4 + 80)  # scales, tables, states of some 80 letters
    assert saved == pytest.approx(values * 1.5 - beside, abs=3 * 6 * 10)
