"""Every registered stage with every method it has: saved, loaded in a clean process, the same logits, bytes as claimed.

A new stage, or a new value of one's METHODS, UPDATES and the like, needs an entry in the tables below.
"""

import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_llmkernel.checkpoint.model_folder import ModelFolder
from hf_llmkernel.compress import Recipe, compress, run
from hf_llmkernel.compress.plan import plan_stages, stored_sizes
from hf_llmkernel.compress.registry import STAGES

from ..conftest import WITHOUT_PACKAGE
from .conftest import save_tiny

pytestmark = pytest.mark.xdist_group("every_method")

# Of which models there are: an encoder and an encoder-decoder when the family has them.
MODELS = {"decoder": lambda folder: save_tiny(folder, num_hidden_layers=2, attention_bias=True, sliding_window=9)}
FFN, HEADS = {"ratio": 0.25, "align": 16}, {"ratio": 0.5}
INT8, INT4 = {"quantize": {"bits": 8, "group_size": 16}}, {"quantize": {"bits": 4, "group_size": 16}}

FLOATING_ZEROS = {"symmetric": False, "zero_point_dtype": "float16"}

PRUNING = [
    {"method": "magnitude", "update": "none"},
    {"method": "wanda"},
    {"method": "flap", "update": "bias"},
    {"method": "minitron", "update": "least_squares_bias"},
    {"method": "obs"},
    {"method": "flap", "allocation": "global"},
]

# Settings of every stage to run with; defaults count as covered.
RUNS = {
    "drop_layers": [
        {"count": 1, "metric": "block_influence"},
        {"count": 1, "metric": "perplexity"},
        {"count": 2, "metric": "block_influence", "unit": "sublayer"},
    ],
    "prune_hidden": [{"ratio": 0.25, "align": 8, "method": "pca"}, {"ratio": 0.25, "align": 8, "method": "minitron"}],
    "prune_heads": [HEADS | settings for settings in (*PRUNING, {"scheme": "within_groups"})],
    "prune_ffn": [FFN | settings for settings in PRUNING],
    "refit": [{}],
    "factorize": [
        {"ratio": 0.3, "align": 4},
        {"ratio": 0.3, "align": 4, "method": "svd"},
        {"ratio": 0.3, "align": 4, "allocation": "global"},
        {"energy": 0.7, "align": 4, "method": "svd"},
    ],
    "sparsify": [
        {"sparsity": 0.5, "method": "magnitude"},
        {"sparsity": 0.5, "method": "magnitude", "scope": "layer", "update": "admm"},
        {"sparsity": 0.5, "method": "wanda", "scope": "row", "update": "none"},
        {"sparsity": 0.5, "method": "sparsegpt"},
        {"sparsity": 0.5, "method": "admm"},
        {"sparsity": 0.5, "method": "wanda", "allocation": "owl"},
        {"sparsity": 0.5, "method": "wanda", "allocation": "searched"},
        {"pattern": "2:4", "method": "wanda", "update": "sparsegpt"},
        {"pattern": "2:4", "method": "sparsegpt", "update": "least_squares"},
        {"pattern": "2:4", "method": "admm"},
    ],
    "quantize": [
        {"bits": 8, "group_size": 16, "embeddings": True},
        {"bits": 8, "group_size": None, "symmetric": False, "fold": "smoothquant"},
        {"bits": 4, "group_size": 16},
        {"bits": 4, "group_size": 24, "symmetric": False},
        {"bits": 4, "group_size": 24, "embeddings": True, "method": "hqq", **FLOATING_ZEROS},
        {"bits": 4, "group_size": 16, "method": "gptq", "act_order": True, "scale_search": True, "fold": "awq"},
        {"bits": 8, "group_size": 24, "method": "gptq", "symmetric": False, "scale_dtype": "bfloat16"},
        {"bits": 4, "group_size": 16, "embeddings": True, "method": "coordinate_descent", **FLOATING_ZEROS},
    ],
    "bitsandbytes": [
        {"quant_type": "nf4", "compute_dtype": "bfloat16"},
        {"quant_type": "fp4", "compute_dtype": "float32", "exclude": ["o_proj"], "layers": [0, 1]},
        {"quant_type": "fp4", "compute_dtype": "float16"},
        {"quant_type": "int8"},
    ],
    "cast": [{"dtype": "float16"}, {"dtype": "bfloat16", "overflow": "clamp"}],
    "search": [
        {"choices": [[INT8], [INT4]], "bytes": 0.24},
        {"choices": [[], [{"prune_ffn": FFN}]], "parameters": 0.95},
        {"choices": [[], [INT8]], "latency": 10_000},
    ],
}
# Values that must be covered beside those that a stage's module lists.
VALUES = {
    "sparsify": {"pattern": {"unstructured", "2:4"}},
    "quantize": {
        "bits": {4, 8},
        "symmetric": {True, False},
        "embeddings": {True, False},
        "scale_dtype": {"float16", "bfloat16"},
        "zero_point_dtype": {"uint8", "float16"},
    },
}
# What every stage cannot do, and the beginning of what it says: of a dense model, or of one whose linears are int8.
REFUSED = {
    "drop_layers": ("dense", {"count": 2}, "drop_layers: count=2 of 2 layers leaves none"),
    "prune_hidden": ("int8", RUNS["prune_hidden"][0], "prune_hidden: layers.0.*q_proj is stored as int8, "),
    "prune_heads": ("int8", HEADS, "prune_heads: layers.0.self_attn.o_proj is stored as int8, "),
    "prune_ffn": ("int8", FFN, "prune_ffn: layers.0.mlp.down_proj is stored as int8, "),
    "refit": ("int8", {}, "refit: layers.0.self_attn.o_proj is stored as int8, "),
    "factorize": ("int8", {"ratio": 0.3, "align": 4}, "factorize: layers.0.*q_proj is stored as int8, "),
    "sparsify": ("int8", {"sparsity": 0.5}, "sparsify: layers.0.self_attn.q_proj is stored as int8, "),
    "quantize": ("int8", {"bits": 4}, "quantize: layers.0.*q_proj is stored as int8, "),
    "bitsandbytes": ("int8", {}, "bitsandbytes: layers.0.self_attn.q_proj is stored as int8, "),
    "cast": ("dense", {"dtype": "float16", "layers": [0, 1]}, "(recipe: )?cast: include, exclude and layers: a model"),
    "search": ("int8", RUNS["search"][0], r"search: choices\[0\]: quantize: layers.0.*q_proj is stored as int8, "),
}
COMPOSED = [
    {"drop_layers": {"count": 1, "metric": "block_influence"}},
    {"prune_heads": HEADS},
    {"prune_ffn": FFN},
    {"factorize": {"ratio": 0.2, "align": 4, "exclude": ["down_proj"]}},
    {"sparsify": {"sparsity": 0.4}},
    {"quantize": {"bits": 8, "group_size": 16, "embeddings": True}},
]
DESCENT = {"quantize": {"bits": 4, "group_size": 16, "method": "coordinate_descent"}}
SECOND = [{"sparsify": {"sparsity": 0.5, "method": "wanda"}}, DESCENT]  # on what the first factorize run wrote
IDS = torch.arange(40).view(2, 20) % 90
CASES = [(name, number) for name in sorted(RUNS) for number in range(len(RUNS[name]))]


def test_the_tables_cover_every_stage_and_every_value():
    assert set(RUNS) == set(REFUSED) == set(STAGES)
    for name, stage in STAGES.items():
        runs = [stage(**settings) for settings in RUNS[name]]
        module = vars(sys.modules[stage.__module__])
        listed = {field.name: module.get(f"{field.name.upper()}S") for field in fields(stage)}
        for setting, values in {**listed, **VALUES.get(name, {})}.items():
            missing = set(values or ()) - {getattr(run, setting) for run in runs}
            assert not missing, f"{name}: no run has {setting} of {missing}"


@pytest.fixture(scope="module", params=MODELS)
def dense(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    MODELS[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def recipe(text):
    """A recipe of some stages."""
    calibration = {"source": str(text), "samples": 8, "length": 32}
    return lambda *stages: Recipe.load({"calibration": calibration, "stages": list(stages)})


@pytest.fixture(scope="module")
def written(dense, recipe, tmp_path_factory):
    """`{case: (folder, what compress returned or raised)}` of every case, the composed recipe and the second one."""
    root = tmp_path_factory.mktemp("written")

    def write(source: Path, name: str, *stages):
        try:
            return root / name, compress(source, recipe(*stages), root / name, progress=False)
        except Exception as error:  # of one case alone: its tests raise it
            return root / name, error

    runs = {case: write(dense, f"{case[0]}-{case[1]}", {case[0]: RUNS[case[0]][case[1]]}) for case in CASES}
    runs["composed"] = write(dense, "composed", *COMPOSED)
    runs["second"] = write(runs["factorize", 0][0], "second", *SECOND)
    return runs


def outcome(written, case):
    """Folder and result of a case. Raises what `compress` raised."""
    folder, result = written[case]
    if isinstance(result, Exception):
        raise result
    return folder, result


CLEAN = """
import sys, torch
from transformers import AutoModelForCausalLM

def look(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    ids = torch.arange(40).view(2, 20) % 90
    with torch.no_grad():
        logits = model(ids).logits
    made = model.generate(
        ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return {"logits": logits, "tokens": made.sequences, "generated": torch.stack(made.logits)}

results = {}
for folder in sys.argv[2:]:
    try:
        results[folder] = look(folder)
    except Exception as error:
        results[folder] = f"{type(error).__name__}: {error}"
torch.save(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def clean(written, tmp_path_factory):
    """What a process without this package makes of every folder; the error of one that it cannot load."""
    work = tmp_path_factory.mktemp("clean")
    environment = {"LLMKERNEL_REGISTRATION": "off", "HF_HOME": str(work / "home"), "OMP_NUM_THREADS": "1"}
    folders = [str(folder) for folder, _ in written.values() if folder.is_dir()]
    command = [sys.executable, "-P", "-c", WITHOUT_PACKAGE + CLEAN, str(work / "results.pt"), *folders]
    ended = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return torch.load(work / "results.pt")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case_name(case) -> str:
    return case if isinstance(case, str) else "-".join([case[0], *map(str, RUNS[case[0]][case[1]].values())])[:60]


@pytest.mark.parametrize("case", [*CASES, "composed", "second"], ids=case_name)
def test_a_clean_process_computes_the_same(case, written, clean, one_thread):
    folder, _ = outcome(written, case)
    result = clean[str(folder)]
    assert isinstance(result, dict), result
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(result["logits"], model(IDS).logits)
    assert result["logits"].isfinite().all() and result["generated"].isfinite().all()
    assert result["tokens"].shape == (2, 23) and torch.equal(result["tokens"][:, :20], IDS)
    assert result["tokens"].max() < model.config.vocab_size


@pytest.mark.parametrize("case", [*CASES, "composed", "second"], ids=case_name)
def test_bytes_are_as_claimed(case, written):
    folder, result = outcome(written, case)
    tensors = load_file(folder / "model.safetensors")
    stored = sum(tensor.nbytes for tensor in tensors.values())
    _, claimed = stored_sizes(ModelFolder(folder).config, ModelFolder(folder).dtype)
    assert stored == claimed == result.weight_bytes
    (header,) = (int.from_bytes((folder / name).read_bytes()[:8], "little") for name in ("model.safetensors",))
    assert (folder / "model.safetensors").stat().st_size == 8 + header + stored


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_the_plan_is_what_is_written(case, written, dense, recipe):
    folder, result = outcome(written, case)
    stages = recipe({case[0]: RUNS[case[0]][case[1]]}).stages
    (planned,) = plan_stages(ModelFolder(dense).config, stages, torch.float32)
    if stages[0].is_global:  # planned as if all layers were alike
        assert "decision" in result.stages[0]
        return
    assert planned.weight_bytes == result.weight_bytes
    assert planned.parameters == stored_sizes(ModelFolder(folder).config, torch.float32)[0]
    assert json.loads(json.dumps(planned.result)) == result.stages[0]["result"]


def test_the_plan_of_a_composed_recipe_is_what_is_written(dense, recipe, tmp_path):
    stages = recipe(*COMPOSED[1:]).stages
    planned = plan_stages(ModelFolder(dense).config, stages, torch.float32)
    result = compress(dense, recipe(*COMPOSED[1:]), tmp_path / "out", progress=False)
    assert planned[-1].weight_bytes == result.weight_bytes
    assert math.prod(len(step.result) for step in planned) == 1
    sizes = [step.weight_bytes for step in planned]
    assert sizes == sorted(sizes, reverse=True)


def test_a_composed_checkpoint_has_every_form(written, dense):
    folder, result = outcome(written, "composed")
    assert [next(iter(stage)) for stage in result.stages] == [next(iter(stage)) for stage in COMPOSED]
    config = ModelFolder(folder).config
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (1, 2, 48)
    factor = config.per_layer_config[0].linear_form("up_proj").factors[0]
    assert (factor.sparsity, factor.bits, factor.group_size) == ("bitmask", 8, 16)
    down = config.per_layer_config[0].linear_form("down_proj")
    assert (down.rank, down.sparsity, down.bits) == (None, "bitmask", 8)
    assert result.weight_bytes < stored_sizes(ModelFolder(dense).config, torch.float32)[1] / 4


def test_a_second_recipe_starts_where_the_first_one_ended(written):
    first, second = (ModelFolder(outcome(written, case)[0]).config for case in (("factorize", 0), "second"))
    before, after = (config.per_layer_config[1].linear_form("up_proj") for config in (first, second))
    assert after.rank == before.rank and before.factors[0].is_dense
    assert all(factor.sparsity == "bitmask" and factor.bits == 4 for factor in after.factors)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_apply_says_so_before_any_work(name, dense, written, recipe, tmp_path, monkeypatch):
    source, settings, message = REFUSED[name]
    folder = {"dense": dense, "int8": outcome(written, ("quantize", 0))[0]}[source]
    monkeypatch.setattr(run.Run, "run", lambda self: pytest.fail("works"))
    with pytest.raises(ValueError, match=f"^{message}") as error:
        compress(folder, recipe({name: settings}), tmp_path / "out", progress=False)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
