"""`llmkernel compress`: a run, its plan, and what is wrong in one line."""

import json
import math
import os

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_llmkernel import cli
from hf_llmkernel.compress import Recipe, compress, preview
from hf_llmkernel.compress.command import ranges, result_text
from hf_llmkernel.compress.disk import write_json
from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig

from .conftest import TINY, save_tiny

STAGES = [
    {"prune_ffn": {"ratio": 0.25, "align": 16, "method": "flap"}},
    {"sparsify": {"sparsity": 0.5, "exclude": ["o_proj"]}},
    {"quantize": {"bits": 8, "group_size": 16, "layers": [0, 2]}},
]
SHAPES = {
    "q_proj": (32, 32),
    "k_proj": (16, 32),
    "v_proj": (16, 32),
    "o_proj": (32, 32),
    "gate_proj": (64, 32),
    "up_proj": (64, 32),
    "down_proj": (32, 64),
}


@pytest.fixture
def recipe(tmp_path, text):
    """Writes a recipe of some stages and returns its path."""

    def write(*stages, **fields) -> str:
        path = tmp_path / "recipe.yaml"
        calibration = {"source": str(text), "samples": 8, "length": 32}
        path.write_text(yaml.safe_dump({"calibration": calibration, "stages": [*stages], **fields}))
        return str(path)

    return write


@pytest.fixture
def known_rate(monkeypatch):
    """The speed of the machine is not measured."""
    monkeypatch.setattr(preview, "product_rate", lambda fast: 1e9)


def run(capfd, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output, and the lines of standard error that are no progress."""
    code = cli.main(["compress", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, "\n".join(line for line in err.splitlines() if line.startswith("error") or "Traceback" in line)


def test_a_run_says_what_every_stage_reached(tiny, recipe, tmp_path, capfd):
    code, out, errors = run(capfd, tiny, "--recipe", recipe(*STAGES), "--output", tmp_path / "out")
    assert (code, errors) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "prune_ffn: layers 0-2: neurons_before 64, neurons 48, ratio_reached 0.25"
    assert lines[1] == "sparsify: layers 0-2: sparsity 0.5, q_proj k_proj v_proj gate_proj up_proj down_proj"
    assert lines[2].startswith("quantize: layers 0-1: ")
    assert lines[3].startswith(f"{tmp_path / 'out'}: ") and "of weights in" in lines[3]
    assert len(lines) == 4  # no dampening was raised


def test_the_plan_is_printed_and_nothing_is_written(tiny, recipe, tmp_path, capfd, known_rate):
    code, out, errors = run(capfd, tiny, "--recipe", recipe(*STAGES), "--dry-run")
    assert (code, errors) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[2:6]] == ["(source)", "prune_ffn", "sparsify", "quantize"]
    assert "about" not in "".join(out.splitlines()[:6])  # nothing is decided over all layers
    assert "1 walks over the blocks, about " in out and out.endswith("Nothing was written.\n")
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_the_plan_has_the_sizes_that_a_run_writes(tiny, recipe, tmp_path, capfd, known_rate):
    arguments = [tiny, "--recipe", recipe(*STAGES, dtype="bfloat16"), "--json"]
    code, out, _ = run(capfd, *arguments, "--dry-run")
    plan = json.loads(out)
    assert code == 0
    assert plan["weight_bytes"] == 2 * plan["parameters"] == 2 * (96 * 32 + 3 * (3072 + 3 * 2048 + 64) + 32)
    code, out, _ = run(capfd, *arguments, "--output", tmp_path / "out")
    written = json.loads(out)
    assert code == 0
    assert plan["stages"][-1]["weight_bytes"] == written["weight_bytes"]
    assert [entry["result"] for entry in plan["stages"]] == [entry["result"] for entry in written["stages"]]
    for name in ("seconds", "peak_memory_bytes", "disk_bytes"):
        assert 0 < plan[name] < math.inf
    assert plan["disk_bytes"] > written["weight_bytes"]


@pytest.mark.parametrize(
    ("config", "model", "fields"),
    [
        (LlamaConfig, LlamaForCausalLM, {}),
        (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        (Qwen2Config, Qwen2ForCausalLM, {}),
        (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_of_another_family_has_the_sizes_that_a_run_writes(config, model, fields, dtype, tmp_path, known_rate):
    shape = {name: value for name, value in TINY.items() if name != "initializer_range"}
    model(config(**{**shape, **fields})).to(dtype).save_pretrained(tmp_path / "model")
    recipe = {"stages": [{"quantize": {"bits": 8, "group_size": 16}}]}
    plan = preview.preview(tmp_path / "model", recipe)
    result = compress(tmp_path / "model", recipe, tmp_path / "out", progress=False)
    assert plan.stages[-1]["weight_bytes"] == result.weight_bytes


def test_what_is_decided_over_all_layers_is_planned_as_about(tiny, recipe, capfd, known_rate):
    stage = {"drop_layers": {"count": 1, "metric": "block_influence"}}
    arguments = [tiny, "--recipe", recipe(STAGES[0], stage, STAGES[2]), "--dry-run"]
    code, out, _ = run(capfd, *arguments)
    assert code == 0
    assert ["about" in line for line in out.splitlines()[2:6]] == [False, False, True, True]
    plan = json.loads(run(capfd, *arguments, "--json")[1])
    assert [stage["estimated"] for stage in plan["stages"]] == [False, True, True]
    assert plan["sweeps"] == 3  # prune_ffn, a survey, then both others


def test_the_plan_of_a_decision_assumes_the_shapes_that_follow_from_its_settings(tiny, recipe, capfd, known_rate):
    stages = [{"drop_layers": {"count": 3, "unit": "sublayer"}}, {"factorize": {"energy": 0.5, "align": 4}}]
    plan = json.loads(run(capfd, tiny, "--recipe", recipe(*stages), "--dry-run", "--json")[1])
    attention, mlp = 2 * 32 * 32 + 2 * 32 * 16 + 32, 3 * 32 * 64 + 32
    assert plan["stages"][0]["parameters"] == plan["parameters"] - 2 * mlp - attention
    (variant, *_) = [entry for entry in plan["stages"][1]["result"] if entry["layers"] == [0]]
    assert variant["assumed"] == "ratio 0.2"
    stored = sum(rank * sum(SHAPES[name]) for name, rank in variant["ranks"].items())
    assert variant["ratio_reached"] == pytest.approx(1 - stored / sum(map(math.prod, SHAPES.values())))
    out = run(capfd, tiny, "--recipe", recipe(*stages), "--dry-run")[1]
    assert "expected: layers 0: ; layers 1: skipped ['mlp']; layers 2: skipped ['attention', 'mlp']" in out


def test_the_bar_shows_the_loss_of_the_last_block(tiny, recipe, tmp_path, capfd):
    cli.main(["compress", str(tiny), "--recipe", recipe(STAGES[1]), "--output", str(tmp_path / "out")])
    assert "3/3" in (err := capfd.readouterr().err) and "sparsify loss " in err


@pytest.mark.parametrize("fast", [True, False])
def test_the_speed_of_products_is_measured(fast):
    assert 1e6 < preview.product_rate(fast) < 1e15


def test_estimates_grow_with_the_work(tiny, text, known_rate):
    def plan(samples: int, *stages) -> tuple[float, int]:
        calibration = {"source": str(text), "samples": samples, "length": 64}
        loaded = Recipe.load({"calibration": calibration, "stages": [*stages]})
        config = LLMKernelConfig.from_pretrained(tiny)
        return preview.estimate_seconds(config, loaded, 0), preview.estimate_memory(config, loaded)

    few, many = plan(64, STAGES[0]), plan(640, STAGES[0])
    gram = plan(64, STAGES[0], STAGES[1])
    assert 0 < few[0] < many[0] < math.inf and few[0] < gram[0]
    assert preview.LIBRARY_BYTES < few[1] == many[1] <= gram[1] < math.inf


@pytest.mark.parametrize(
    ("arguments", "stages", "message"),
    [
        ([], STAGES, "output: is missing; name the folder to write with --output, or use --dry-run"),
        (["--dry-run"], [{"prune_ffn": {"ratio": 2}}], "prune_ffn: ratio=2: must be above 0 and below 1"),
        (["--dry-run"], [{"distill": {}}], "unknown stage 'distill'; the known ones are"),
        (["--dry-run"], [{"quantize": {"bits": 8, "layers": [0, 9]}}], r"layers=[0, 9] is beyond the 3 layers"),
        (["--output", "{tmp}/out", "--memory", "much"], STAGES, "memory=much"),
        (["--output", "{tmp}/recipe.yaml"], STAGES, "recipe.yaml: exists and is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_2(arguments, stages, message, tiny, recipe, tmp_path, capfd):
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    code, out, errors = run(capfd, tiny, "--recipe", recipe(*stages), *given)
    assert (code, out) == (2, "")
    assert errors.startswith("error: ") and "\n" not in errors
    assert message in errors
    assert os.listdir(tmp_path) == ["recipe.yaml"]


@pytest.mark.parametrize("content", [None, "stages: [", "- 1"])
def test_a_recipe_that_cannot_be_read_is_one_line_and_2(content, tiny, tmp_path, capfd):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    code, out, errors = run(capfd, tiny, "--recipe", path, "--output", tmp_path / "out")
    assert (code, out) == (2, "") and errors.startswith("error: ") and "recipe.yaml" in errors and "\n" not in errors


def test_an_unfinished_run_of_another_recipe_is_one_line_and_2(tiny, recipe, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        files = []

        def full_at_the_third(path, content):
            files.append(path)
            if len(files) == 3:  # a block and the seconds are written
                raise OSError(28, "full")
            write_json(path, content)

        patch.setattr("hf_llmkernel.compress.sweep.write_json", full_at_the_third)
        assert run(capfd, tiny, "--recipe", recipe(*STAGES), "--output", out)[0] == 1
    code, _, errors = run(capfd, tiny, "--recipe", recipe(STAGES[0]), "--output", out)
    assert code == 2
    assert "out.part: holds an unfinished run of another recipe; give the same one to go on, or remove" in errors
    assert run(capfd, tiny, "--recipe", recipe(*STAGES), "--output", out)[0] == 0
    assert not (tmp_path / "out.part").exists()


def test_raised_dampening_is_told(recipe, tmp_path, capfd):
    folder = tmp_path / "dense"
    model = save_tiny(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[::2] = 0  # half of the inputs of down_proj are zero
    model.save_pretrained(folder)
    stage = {"prune_ffn": {"ratio": 0.25, "align": 16, "method": "magnitude", "dampening": 0}}
    code, out, _ = run(capfd, folder, "--recipe", recipe(stage), "--output", tmp_path / "out")
    assert code == 0
    assert "dampening was raised in 1 solves, the first in layer 1" in out


def test_an_evaluation_ends_with_the_report(tiny, recipe, text, tmp_path, capfd):
    evaluation = {"source": str(text), "context": 40, "tokens": 80, "speed": False}
    path = recipe(STAGES[2], evaluation=evaluation)
    code, out, _ = run(capfd, tiny, "--recipe", path, "--output", tmp_path / "out")
    assert code == 0
    assert "perplexity" in out and tiny.name in out


def test_values_that_became_zero_are_told(recipe, tmp_path, capfd):
    model = save_tiny(tmp_path / "small")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[:2] = 1e-9
    model.save_pretrained(tmp_path / "small")
    path = recipe({"quantize": {"bits": 4, "group_size": 16}})
    code, out, _ = run(capfd, tmp_path / "small", "--recipe", path, "--output", tmp_path / "out")
    told = "quantize: 64 values became zero, as float16 has no scale so small, the first in layer 1, gate_proj; scale_"
    assert code == 0 and told in out
    notes = json.loads((tmp_path / "out" / "compression.json").read_text())["notes"]
    assert [(note["layer"], note["matrix"], note["underflowed"]) for note in notes] == [(1, "gate_proj", 64)]


def test_the_embedding_and_head_alone_are_named(tiny, recipe, tmp_path, capfd):
    path = recipe({"quantize": {"bits": 8, "group_size": 16, "exclude": ["*"], "embeddings": True}})
    code, out, _ = run(capfd, tiny, "--recipe", path, "--output", tmp_path / "out")
    assert code == 0 and out.splitlines()[0] == "quantize: embedding and head"


def test_results_in_words():
    assert ranges([0, 1, 2, 4, 7, 8]) == "0-2, 4, 7-8"
    result = {"rank": 8, "loss": 0.123456, "sizes": {"a": 1}, "matrices": ["q_proj", "o_proj"], "layers": [0, 2]}
    assert result_text(result) == "layers 0, 2: rank 8, loss 0.1235, sizes a:1, q_proj o_proj"
    each = {"q_proj": {"last_group_size": 8}, "k_proj": {"last_group_size": 8}, "o_proj": {"last_group_size": 4}}
    text = result_text({"each": each, "layers": [0]})
    assert text == "layers 0: last_group_size 8 (q_proj k_proj), last_group_size 4 (o_proj)"
