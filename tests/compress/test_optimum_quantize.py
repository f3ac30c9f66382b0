"""Quantization by Optimum's conventions: every method by its name, what is measured, and the command."""

import json

import pytest
from optimum.configuration_utils import BaseConfig
from optimum.quantization_base import OptimumQuantizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_llmkernel import LLMKernelQuantizationConfig, LLMKernelQuantizer
from hf_llmkernel.compress import Recipe
from hf_llmkernel.compress.optimum_quantize import BITSANDBYTES
from hf_llmkernel.compress.quantize.stage import METHODS
from tests.compress.test_optimum import optimum_cli  # noqa: F401 a fixture

from .conftest import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of which 64 divides the inputs of every linear."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, hidden_size=64)
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Of which 64 does not divide the inputs of down_proj, and one layer does not attend."""
    folder = tmp_path_factory.mktemp("odd")
    save_tiny(folder, hidden_size=64, intermediate_size=80, per_layer_config={1: {"skip": ["attention"]}})
    return folder


def stored_bits(folder) -> float:
    """All that is stored of the blocks' linears over their weights."""
    tensors = load_file(folder / "model.safetensors")
    nbytes = sum(t.nbytes for name, t in tensors.items() if "_proj." in name)
    return 8 * nbytes / (3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64))


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        ({"method": "bnb-nf4"}, {"bitsandbytes": {"quant_type": "nf4"}}),
        ({"method": "bnb-int8", "bits": 8}, {"bitsandbytes": {"quant_type": "int8"}}),
        (
            {"method": "bnb-fp4", "settings": {"double_quant": True}, "op_names": ["q_proj"], "layers": [0, 2]},
            {"bitsandbytes": {"quant_type": "fp4", "double_quant": True, "include": ["q_proj"], "layers": [0, 2]}},
        ),
        ({"bits": 4}, {"quantize": {"bits": 4}}),
        ({"bits": 8, "group_size": -1}, {"quantize": {"bits": 8, "group_size": None}}),
        (
            {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": False, "settings": {"scale_search": True}},
            {"quantize": {"bits": 4, "group_size": 32, "symmetric": False, "scale_search": True}},
        ),
        (
            {"bits": 8, "embeddings": True, "excluded_op_names": ["lm_head", "mlp.*"]},
            {"quantize": {"bits": 8, "embeddings": True, "exclude": ["mlp.*"]}},
        ),
    ],
)
def test_config_stands_for_a_recipe(settings, stage):
    assert LLMKernelQuantizationConfig(**settings).to_recipe() == Recipe.load({"stages": [stage]})


def test_every_method_of_the_stages_is_known():
    assert {"rtn", "gptq"} <= set(METHODS) and set(BITSANDBYTES) == {"bnb-nf4", "bnb-fp4", "bnb-int8"}
    with pytest.raises(ValueError) as refused:
        LLMKernelQuantizationConfig(method="nf4", bits=4)
    assert all(f"'{method}'" in str(refused.value) for method in (*METHODS, *BITSANDBYTES))
    for method in set(METHODS) - {"hqq"}:
        calibration = {"source": "bbc"} if METHODS[method].needs_data else None
        (stage,) = LLMKernelQuantizationConfig(method=method, bits=4, calibration=calibration).to_recipe().stages
        assert stage.method == method


@pytest.mark.parametrize("settings", [{"method": "bnb-nf4"}, {"bits": 8, "group_size": 16}, {"method": "bnb-int8"}])
def test_quantized_and_measured(tmp_path, model, settings):
    quantizer = LLMKernelQuantizer.from_pretrained(model)
    done = quantizer.quantize(tmp_path / "out", progress=False, **settings)
    assert isinstance(quantizer, OptimumQuantizer) and isinstance(done, BaseConfig)
    assert done.measured_bits_per_weight == pytest.approx(stored_bits(tmp_path / "out"), rel=1e-12)
    assert done.measured_bytes == sum(t.nbytes for t in load_file(tmp_path / "out/model.safetensors").values())
    written = json.loads((tmp_path / "out/quantization_config.json").read_text())
    assert written["measured_bytes"] == done.measured_bytes and "transformers_version" in written
    again = LLMKernelQuantizationConfig.from_pretrained(tmp_path / "out")
    assert again.to_recipe() == LLMKernelQuantizationConfig(**settings).to_recipe()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_ready_recipe_and_table(tmp_path, model):
    recipe = {"stages": [{"quantize": {"bits": 4, "group_size": 16}}]}
    quantizer = LLMKernelQuantizer.from_pretrained(model)
    by_recipe = quantizer.quantize(tmp_path / "recipe", quantization_config=Recipe.load(recipe), progress=False)
    table = {"bits": 4, "group_size": 16}
    by_table = quantizer.quantize(tmp_path / "table", quantization_config=table, progress=False)
    assert by_recipe.measured_bytes == by_table.measured_bytes
    assert Recipe.load(by_recipe.recipe) == Recipe.load(recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "bits: is missing; give --bits 8 or 4, or bits: 8 or 4 in a recipe"),
        ({"bits": 3}, "bits=3: must be 8 or 4"),
        ({"method": "bnb-nf4", "bits": 8}, "bits=8: method='bnb-nf4' has 4; leave it out"),
        ({"method": "bnb-int8", "group_size": 64}, "group_size=64: method='bnb-int8' has its own"),
        ({"method": "bnb-nf4", "symmetric": False}, "symmetric=False: method='bnb-nf4' has its own"),
        ({"method": "bnb-nf4", "embeddings": True}, "embeddings=true: this stage works on the blocks alone"),
        ({"bits": 4, "settings": {"act_ordr": True}}, "unknown keys .'act_ordr'.; the known ones are"),
        ({"bits": 4, "settings": {"bits": 8}}, "settings: .'bits'. are no further settings"),
        ({"bits": 4, "settings": "act_order"}, "settings='act_order': must be a table"),
        ({"bits": 4, "op_names": "q_proj"}, "op_names='q_proj': must be a list"),
        ({"bitz": 4}, "quantization config: unknown names .'bitz'.; the known ones are"),
        ({"bits": 4, "group_size": 0}, "^group_size=0: must be at least 1, or -1 for one scale a row"),
        ({"bits": 4, "group_size": -2}, "^group_size=-2: must be at least 1, or -1 for one scale a row"),
        ({"bits": 4, "group_size": "x"}, "quantize: group_size='x': must be an integer of at least 1, or null for one"),
        ({"bits": 4, "method": "awq"}, r"method='awq': must be one of .*; 'awq' is a fold, .* beside one: fold: awq"),
        (
            {"method": "bnb-nf4", "calibration": {"source": "bbc"}},
            "^calibration={'source': 'bbc'}: method='bnb-nf4' looks at no activations; leave it out, .*'gptq'",
        ),
        ({"bits": 4, "calibration": {"samples": 4}}, "^calibration={'samples': 4}: method='rtn' looks at no activatio"),
        ({"bits": 4, "calibration": "bbc"}, "calibration='bbc': must be a table"),
        ({"bits": 4, "recipe": {"stages": [{"quantize": {"bits": 4}}]}}, "recipe: says all there is, but .'bits'."),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        LLMKernelQuantizationConfig(**settings)
    assert "\n" not in str(refused.value)


def test_bad_calls_write_nothing(tmp_path, model):
    quantizer = LLMKernelQuantizer.from_pretrained(model)
    with pytest.raises(ValueError, match="file_prefix='a': the files have fixed names"):
        quantizer.quantize(tmp_path / "out", file_prefix="a", bits=8)
    with pytest.raises(ValueError, match="quantization_config: says all, but .'bits'. are given too"):
        quantizer.quantize(tmp_path / "out", quantization_config={"bits": 4}, bits=8)
    with pytest.raises(ValueError, match="quantization_config=4: must be an LLMKernelQuantizationConfig"):
        quantizer.quantize(tmp_path / "out", quantization_config=4)
    with pytest.raises(ValueError, match="model=5: must be a folder, a .gguf file, a Hub id, or a loaded"):
        LLMKernelQuantizer.from_pretrained(5).quantize(tmp_path / "out", bits=8)
    with pytest.raises(ValueError, match="out: exists and is not empty"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").touch()
        quantizer.quantize(tmp_path / "out")  # without bits, too
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_command_quantize(optimum_cli, tmp_path, model):  # noqa: F811
    code, out, err = optimum_cli("quantize", "-m", model, "-o", tmp_path / "nf4", "--method", "bnb-nf4", "--json")
    assert code == 0 and "error" not in err
    result = json.loads(out)
    (stage,) = result.pop("stages")
    assert result == json.loads((tmp_path / "nf4/quantization_config.json").read_text())
    assert stage["bitsandbytes"]["quant_type"] == "nf4" and stage["result"][0]["layers"] == [0, 1, 2]
    options = ["--method", "rtn", "--bits", 4, "--group-size", 32, "--asymmetric", "--set", "scale_search=true"]
    code, out, _ = optimum_cli("quantize", "-m", model, "-o", tmp_path / "int4", *options)
    said = out.splitlines()
    assert code == 0 and said[0].startswith("quantize: layers 0-2: ") and len(said) == 2
    assert said[1].startswith(f"{tmp_path / 'int4'}: ") and "bits a weight in the linears" in said[1]
    (stage,) = Recipe.load(tmp_path / "int4/recipe.yaml").stages
    assert (stage.bits, stage.group_size, stage.symmetric, stage.scale_search) == (4, 32, False, True)


def test_command_quantize_says_what_stays_floating_and_which_groups_are_short(optimum_cli, tmp_path, odd):  # noqa: F811
    _, out, _ = optimum_cli("quantize", "-m", odd, "-o", tmp_path / "nf4", "--method", "bnb-nf4")
    assert "stay_floating ['down_proj']" in out.splitlines()[0]
    options = ["--bits", 4, "--group-size", 64, "--json"]
    _, out, _ = optimum_cli("quantize", "-m", odd, "-o", tmp_path / "int4", *options)
    assert json.loads(out)["stages"][0]["result"][0]["each"]["down_proj"] == {"last_group_size": 16}


def test_what_would_quantize_nothing_is_refused_and_nothing_is_written(optimum_cli, tmp_path, odd):  # noqa: F811
    options = ["--method", "bnb-nf4", "--op-names", "down_proj"]
    code, _, err = optimum_cli("quantize", "-m", odd, "-o", tmp_path / "out", *options)
    assert code == 2 and "bitsandbytes: quantizes nothing, for quant_type='nf4' takes linears whose inputs 64" in err
    assert "and down_proj are all that was chosen" in err and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="quantize: finds no matrix to work on in the layers it takes"):
        settings = {"bits": 4, "op_names": ["q_proj"], "layers": [1, 2]}
        LLMKernelQuantizer.from_pretrained(odd).quantize(tmp_path / "out", progress=False, **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nf4"], "method='nf4': must be one of"),
        (["--bits", "four"], "argument --bits: invalid int value: 'four'"),
        (["--bits", "4", "--set", "act_order"], "--set act_order: must be NAME=VALUE"),
        (["--bits", "4", "--set", "act_order=maybe", "--method", "gptq"], "act_order='maybe': must be true or false"),
        (["--method", "gptq", "--bits", "4"], "calibration.source=null: quantize looks at activations"),
        ([], "bits: is missing; give --bits 8 or 4"),
        (["--bits", "4", "--dtype", "float8"], "dtype='float8': must be one of ['float32', 'bfloat16', 'float16']"),
        (["-m", "/no/model"], "source=/no/model: is neither a folder"),  # bits are missing, too
    ],
)
def test_bad_usage_ends_with_two_and_one_line(optimum_cli, monkeypatch, tmp_path, arguments, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    code, out, err = optimum_cli("quantize", "-m", "m", "-o", "o", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())
