"""Optimum's conventions: configs in its names, the sparsity that was measured, and `optimum-cli llmkernel`."""

import json

import pytest
import torch
from optimum.commands.base import RootOptimumCLICommand
from optimum.configuration_utils import BaseConfig
from optimum.quantization_base import OptimumQuantizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_llmkernel import LLMKernelPruner, LLMKernelPruningConfig
from hf_llmkernel.compress import Recipe, compress
from hf_llmkernel.optimum_cli import LLMKernelCommand

from ..convert.ggufs import write_gguf
from .conftest import TINY, word_tokenizer

NEURONS = {"target_sparsity": 0.3, "pattern": "neurons", "pruning_type": "magnitude", "update": "none", "align": 16}
WEIGHTS = {"target_sparsity": 0.3, "pruning_type": "magnitude"}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def zero_share(folder, *leaves) -> float:
    """Share of zeros in the dense weights of linears, by what the loaded model computes with."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    linears = [module for name, module in model.named_modules() if name.rpartition(".")[2] in leaves]
    weights = [linear.dense_weight() if hasattr(linear, "dense_weight") else linear.weight for linear in linears]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def count_weights(folder, *leaves) -> int:
    tensors = load_file(folder / "model.safetensors")
    return sum(tensor.numel() for name, tensor in tensors.items() if name.split(".")[-2] in leaves)


def saved(folder) -> dict:
    return json.loads((folder / "pruning_config.json").read_text())


def test_optimum_bases():
    assert issubclass(LLMKernelPruner, OptimumQuantizer) and issubclass(LLMKernelPruningConfig, BaseConfig)


def test_neurons_are_pruned_and_counted(tmp_path, tiny):
    LLMKernelPruner.from_pretrained(tiny).prune(save_dir=tmp_path / "out", pruning_config=NEURONS, progress=False)
    stage = {"prune_ffn": {"ratio": 0.3, "align": 16, "method": "magnitude", "update": "none"}}
    compress(tiny, {"stages": [stage]}, tmp_path / "reference", progress=False)
    tensors, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "reference"))
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)

    written = saved(tmp_path / "out")
    assert written["target_sparsity"] == 0.3
    assert written["measured_sparsity"] == 1 - count_weights(tmp_path / "out", *MLP) / count_weights(tiny, *MLP) == 0.25
    assert written["measured_sparsity_by_op"] == {**dict.fromkeys(ATTENTION, 0.0), **dict.fromkeys(MLP, 0.25)}


@pytest.mark.parametrize("names", [{}, {"op_names": ["q_proj", "mlp.*"], "excluded_op_names": ["lm_head", "up_proj"]}])
def test_weights_are_pruned_and_counted(tmp_path, tiny, names):
    config = LLMKernelPruningConfig(**WEIGHTS, **names)
    done = LLMKernelPruner.from_pretrained(tiny).prune(tmp_path / "out", config, progress=False)
    pruned = ("q_proj", "gate_proj", "down_proj") if names else ATTENTION + MLP
    assert config.measured_sparsity is None
    assert done.measured_sparsity == pytest.approx(zero_share(tmp_path / "out", *pruned), abs=1e-12)
    assert done.measured_sparsity == pytest.approx(0.3, abs=0.02) and done.measured_sparsity != 0.3
    for leaf, sparsity in (done.measured_sparsity_by_op or {}).items():
        assert sparsity == pytest.approx(zero_share(tmp_path / "out", leaf), abs=1e-12)
        assert (sparsity > 0) == (leaf in pruned)


def test_biases_of_the_update_are_no_weights(tmp_path, tiny, text):
    config = {**NEURONS, "pruning_type": "flap", "update": "bias"}
    config["calibration"] = {"source": str(text), "samples": 4, "length": 32}
    done = LLMKernelPruner.from_pretrained(tiny).prune(tmp_path / "out", config, progress=False)
    assert "model.layers.0.mlp.down_proj.bias" in load_file(tmp_path / "out" / "model.safetensors")
    assert done.measured_sparsity_by_op["down_proj"] == 0.25


def test_ready_recipe(tmp_path, tiny, text):
    recipe = Recipe.load({
        "calibration": {"source": str(text), "samples": 4, "length": 32},
        "stages": [{"drop_layers": {"count": 1, "metric": "block_influence"}}, {"quantize": {"bits": 8}}],
    })
    done = LLMKernelPruner.from_pretrained(tiny).prune(tmp_path / "out", recipe, progress=False)
    assert done.measured_sparsity == pytest.approx(1 / 3)
    assert done.target_sparsity is None and done.to_recipe() == recipe == Recipe.load(tmp_path / "out" / "recipe.yaml")


def test_layers_that_lose_different_shares(tmp_path, tiny, text):
    """All linears of a kind count, as the files have them: those of OWL, and those that `layers` leaves out."""
    calibration = {"source": str(text), "samples": 4, "length": 32}
    config = {"target_sparsity": 0.6, "pruning_type": "wanda", "pruning_scope": "global", "layers": [0, 2]}
    pruner = LLMKernelPruner.from_pretrained(tiny)
    done = pruner.prune(tmp_path / "out", {**config, "calibration": calibration}, progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kept = [tensors[f"model.layers.{layer}.mlp.up_proj.values"].numel() for layer in (0, 1)]
    assert kept[0] != kept[1]
    assert done.measured_sparsity_by_op["up_proj"] == 1 - (sum(kept) + 64 * 32) / (3 * 64 * 32)


def test_a_recipe_that_prunes_nothing_measures_nothing(tmp_path, tiny):
    recipe = {"stages": [{"quantize": {"bits": 8}}]}
    assert LLMKernelPruner.from_pretrained(tiny).prune(tmp_path / "out", recipe, progress=False).measured_sparsity == 0


def test_saved_config_loads_and_prunes_again(tmp_path, tiny):
    pruner = LLMKernelPruner.from_pretrained(tiny)
    done = pruner.prune(tmp_path / "out", NEURONS, progress=False)
    loaded = LLMKernelPruningConfig.from_pretrained(tmp_path / "out")
    assert loaded.to_dict() == done.to_dict() == saved(tmp_path / "out")
    stamps = {"transformers_version", "optimum_version", "measured_sparsity", "measured_sparsity_by_op"}
    assert set(saved(tmp_path / "out")) - stamps == {
        "target_sparsity", "pruning_type", "pattern", "pruning_scope", "op_names", "excluded_op_names", "layers",
        "update", "align", "dtype", "calibration", "evaluation", "recipe",
    }  # fmt: skip
    again = LLMKernelPruner.from_pretrained(tmp_path / "out").prune(tmp_path / "again", loaded, progress=False)
    assert again.measured_sparsity == pytest.approx(1 / 3)  # 48 neurons to 32


def test_model_in_memory_and_gguf_file(tmp_path):
    fields = {name: value for name, value in TINY.items() if name != "initializer_range"}
    llama = LlamaForCausalLM(LlamaConfig(**fields))
    pruner = LLMKernelPruner.from_pretrained(llama, tokenizer=word_tokenizer())
    assert pruner.prune(tmp_path / "llama", NEURONS, progress=False).measured_sparsity == 0.25
    assert (tmp_path / "llama" / "tokenizer.json").is_file()
    for name in ("tiny.gguf", "other.gguf"):
        write_gguf(tmp_path / name)
    pruner = LLMKernelPruner.from_pretrained(tmp_path, file_name="tiny.gguf")
    done = pruner.prune(tmp_path / "gguf", {"pattern": "2:4", "pruning_type": "magnitude"}, progress=False)
    assert done.measured_sparsity == zero_share(tmp_path / "gguf", *ATTENTION, *MLP) == 0.5


def test_quantize_of_the_base_class(tmp_path, tiny):
    pruner = LLMKernelPruner.from_pretrained(tiny)
    assert pruner.quantize(tmp_path / "out", bits=8, group_size=16) == tmp_path / "out"
    stage = {"quantize": {"bits": 8, "group_size": 16}}
    compress(tiny, {"stages": [stage]}, tmp_path / "reference", progress=False)
    written, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "reference"))
    assert written == expected
    with pytest.raises(ValueError, match="file_prefix='int8': the files have fixed names"):
        pruner.quantize(tmp_path / "other", "int8", bits=8)


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        ({"target_sparsity": 0.5, "pruning_type": "wanda"}, {"sparsify": {"sparsity": 0.5, "method": "wanda"}}),
        ({"target_sparsity": 0.5, "pattern": "1x1"}, {"sparsify": {"sparsity": 0.5}}),
        ({"pattern": "2:4", "update": "admm"}, {"sparsify": {"pattern": "2:4", "update": "admm"}}),
        ({"target_sparsity": 0.6, "pruning_scope": "global"}, {"sparsify": {"sparsity": 0.6, "allocation": "owl"}}),
        (
            {"target_sparsity": 0.5, "op_names": ["mlp.*"], "excluded_op_names": ["down_proj"], "layers": [1, 3]},
            {"sparsify": {"sparsity": 0.5, "include": ["mlp.*"], "exclude": ["down_proj"], "layers": [1, 3]}},
        ),
        (
            {"target_sparsity": 0.2, "pattern": "channelx1", "align": 32, "pruning_scope": "global"},
            {"prune_ffn": {"ratio": 0.2, "align": 32, "allocation": "global"}},
        ),
        (
            {"target_sparsity": 0.5, "pattern": "mha", "pruning_type": "obs", "layers": [0, 2]},
            {"prune_heads": {"ratio": 0.5, "method": "obs", "layers": [0, 2]}},
        ),
    ],
)
def test_config_stands_for_a_recipe(settings, stage):
    rest = {"calibration": {"source": "bbc"}, "evaluation": {"source": "bible"}, "dtype": "bfloat16"}
    assert LLMKernelPruningConfig(**settings, **rest).to_recipe() == Recipe.load({"stages": [stage], **rest})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "target_sparsity=None: must be above 0 and below 1"),
        ({"target_sparsity": 1.5}, "target_sparsity=1.5: must be above 0"),
        ({"target_sparsity": "half"}, "target_sparsity='half': must be above 0"),
        ({"pattern": "neurons"}, "target_sparsity=None"),
        ({"target_sparsity": 0.5, "pattern": "4x1"}, "pattern='4x1': must be 'unstructured', 'N:M' .* blocks such as"),
        ({"pattern": "4:2"}, "pattern='4:2': must be"),
        ({"pattern": "2:4", "target_sparsity": 0.3, "pruning_type": "magnitude"}, "pattern='2:4' removes 0.5"),
        ({"pattern": "2:4", "pruning_scope": "global"}, "pruning_scope='global': pattern='2:4' fixes every layer"),
        ({**WEIGHTS, "pruning_scope": "all"}, r"pruning_scope='all': must be one of \['local', 'global'\]"),
        ({**WEIGHTS, "pruning_type": "snip"}, "pruning_type='snip': pattern='unstructured' knows .*'wanda'"),
        ({**NEURONS, "pruning_type": "admm"}, "pruning_type='admm': pattern='neurons' knows .*'flap'"),
        ({**NEURONS, "op_names": ["up_proj"]}, "op_names=.*: neurons are removed from all linears"),
        ({**WEIGHTS, "op_names": "q_proj"}, "op_names='q_proj': must be a list"),
        ({**WEIGHTS, "op_names": []}, r"op_names=\[\]: leaves no linear to work on; leave it out for all"),
        ({**WEIGHTS, "align": 16}, "align=16: goes with pattern='neurons' alone"),
        ({**WEIGHTS, "start_step": 0}, r"\['start_step'\] are of pruning while training; .*GradualPruning"),
        ({"target_sparsity": 0.5, "pruning_type": "wanda"}, "calibration.source=null: sparsify looks at activations"),
        ({**WEIGHTS, "recipe": {"stages": []}}, r"says all there is, but \['target_sparsity', 'pruning_type'\]"),
        ({"recipe": {"stages": [{"quantize": {"bits": 9}}]}}, "quantize: bits=9"),
    ],
)
def test_bad_config_is_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as raised:
        LLMKernelPruningConfig(**settings)
    assert "\n" not in str(raised.value)


def test_bad_input_writes_nothing(tmp_path, tiny):
    pruner = LLMKernelPruner.from_pretrained(tiny)
    for given, message in ((0.5, "must be an LLMKernelPruningConfig"), ({**WEIGHTS, "op_names": ["w"]}, "'w' matches")):
        with pytest.raises(ValueError, match=message):
            pruner.prune(tmp_path / "out", given, progress=False)
    with pytest.raises(ValueError, match="is neither a folder, a .gguf file nor a Hub id"):
        LLMKernelPruner.from_pretrained(tmp_path / "none").prune(tmp_path / "out", NEURONS, progress=False)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type='bert': cannot be pruned"):
        LLMKernelPruner.from_pretrained(tmp_path / "bert").prune(tmp_path / "out", NEURONS, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"bert"}


@pytest.fixture
def optimum_cli(capsys):
    """Runs `optimum-cli llmkernel …` as Optimum does; returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
        LLMKernelCommand(root.subparsers)
        code = 0
        try:
            given = root.parser.parse_args(["llmkernel", *map(str, arguments)])
            given.func(given).run()
        except SystemExit as ending:
            code = ending.code
        return code, *capsys.readouterr()

    return run


def test_command_prune(optimum_cli, tmp_path, tiny):
    options = ["--target-sparsity", 0.3, "--pattern", "neurons", "--pruning-type", "magnitude", "--update", "none"]
    where = ["-m", tiny, "--align", 16]
    code, out, err = optimum_cli("prune", *where, "-o", tmp_path / "out", *options, "--json")
    assert code == 0 and json.loads(out) == saved(tmp_path / "out")
    assert saved(tmp_path / "out")["measured_sparsity"] == 0.25 and "error" not in err
    code, out, _ = optimum_cli("prune", *where, "-o", tmp_path / "text", *options)
    assert code == 0 and out.startswith(f"{tmp_path / 'text'}: measured sparsity 0.25 (q_proj 0, ")


def test_command_prune_takes_every_setting(optimum_cli, monkeypatch):
    options = ["--target-sparsity", 0.5, "--pruning-type", "wanda", "--op-names", "q_proj", "mlp.*", "--seed", 3]
    options += ["--excluded-op-names", "up_proj", "--layers", 0, 2, "--pruning-scope", "global", "--dtype", "bfloat16"]
    options += ["--update", "admm", "--calibration", "bbc", "--samples", 4, "--length", 32, "--evaluation", "bible"]
    asked = []

    def prune(self, save_dir, config):
        print("a library prints")
        asked.append((self.model_or_path, save_dir, config.to_recipe()))
        return LLMKernelPruningConfig(**WEIGHTS, measured_sparsity=0.5, measured_sparsity_by_op={"q_proj": 0.5})

    monkeypatch.setattr(LLMKernelPruner, "prune", prune)
    ended = optimum_cli("prune", "-m", "model", "-o", "out", *options)
    assert ended == (0, "out: measured sparsity 0.5 (q_proj 0.5)\n", "a library prints\n")
    settings = {"sparsity": 0.5, "method": "wanda", "update": "admm", "allocation": "owl", "layers": [0, 2]}
    expected = {
        "dtype": "bfloat16",
        "calibration": {"source": "bbc", "samples": 4, "length": 32, "seed": 3},
        "evaluation": {"source": "bible"},
        "stages": [{"sparsify": {**settings, "include": ["q_proj", "mlp.*"], "exclude": ["up_proj"]}}],
    }
    assert asked == [("model", "out", Recipe.load(expected))]


def test_command_compress(optimum_cli, tmp_path, tiny):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages: [{quantize: {bits: 8, group_size: 16}}]")
    code, out, _ = optimum_cli("compress", "-m", tiny, "--recipe", recipe, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["sweeps"] == 1 and not (tmp_path / "out").exists()
    code, out, _ = optimum_cli("compress", "-m", tiny, "--recipe", recipe, "-o", tmp_path / "out")
    assert code == 0 and out.startswith("quantize: layers 0-2")
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == Recipe.load(recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "-m", "tiny"], "arguments are required: -o/--output; see `optimum-cli llmkernel prune --help`"),
        (["prune", "-m", "m", "-o", "o", "--align", "x"], "argument --align: invalid int value: 'x'"),
        (["prune", "-m", "m", "-o", "o", "--target-sparsity", "3"], "target_sparsity=3.0: must be above 0 and below 1"),
        (["prune", "-m", "/none", "-o", "o", "--pattern", "2:4", "--pruning-type", "magnitude"], "source=/none: is"),
        (["compress", "-m", "m", "--recipe", "none.yaml", "-o", "o"], "recipe=none.yaml: there is no such file"),
        (["quantise"], "invalid choice: 'quantise'"),
    ],
)
def test_bad_usage_ends_with_two_and_one_line(optimum_cli, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = optimum_cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_commands_listed_are_those_that_work(optimum_cli):
    assert "{prune,quantize,compress} ..." in optimum_cli("--help")[1]
    assert optimum_cli()[0] == 0
