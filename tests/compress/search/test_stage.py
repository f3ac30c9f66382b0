"""Whole runs with a search: what it takes, what it writes, and what it refuses."""

import itertools
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_llmkernel.compress import Recipe, compress
from hf_llmkernel.compress.plan import own_layers
from hf_llmkernel.compress.preview import preview
from hf_llmkernel.compress.search import costs as costing
from hf_llmkernel.compress.search import stage as searching
from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig

SPARSE = {"sparsify": {"sparsity": 0.5}}
INT8 = {"quantize": {"bits": 8, "group_size": 16}}
PRUNE = {"prune_ffn": {"ratio": 0.25, "align": 16}}
CHOICES = [[], [{"sparsify": {"sparsity": 0.25}}], [SPARSE], [PRUNE, SPARSE], [SPARSE, INT8]]
NAMES = ["as it is", "sparsify sparsity=0.25", "sparsify sparsity=0.5", "prune_ffn ratio=0.25 align=16 + sparsify "
         "sparsity=0.5", "sparsify sparsity=0.5 + quantize bits=8 group_size=16"]  # fmt: skip


def recipe(text, *behind, choices=CHOICES, dtype=None, **settings) -> Recipe:
    search = {"search": {"tokens": 192, "choices": choices, **settings}}
    calibration = {"source": str(text), "samples": 12, "length": 48}
    return Recipe.load({"dtype": dtype, "calibration": calibration, "stages": [search, *behind]})


def block_bytes(folder) -> list[int]:
    """Bytes of each layer in the file."""
    tensors = load_file(folder / "model.safetensors")
    return [sum(t.nbytes for name, t in tensors.items() if f"layers.{index}." in name) for index in range(3)]


@pytest.mark.parametrize("budget", [0.5, 70_000])
def test_result_is_within_the_budget_and_the_best_of_the_table(tmp_path, tiny, text, budget):
    result = compress(tiny, recipe(text, bytes=budget), tmp_path / "out", progress=False)
    decision = result.stages[0]["decision"]
    assert decision["choices"] == NAMES and decision["tokens"] == 192
    present = sum(block_bytes(tiny))
    assert decision["present"] == present and decision["budget"] == (budget if budget > 1 else present / 2)
    table = {row["layer"]: row for row in decision["table"]}
    stored = block_bytes(tmp_path / "out")
    assert stored == [table[layer]["costs"][choice] for layer, choice in enumerate(decision["targets"])]
    assert sum(stored) == decision["cost"] <= decision["budget"]
    best = min(
        sum(table[layer]["losses"][choice] for layer, choice in enumerate(mix))
        for mix in itertools.product(range(5), repeat=3)
        if sum(table[layer]["costs"][choice] for layer, choice in enumerate(mix)) <= decision["budget"]
    )
    assert decision["predicted_loss"] == pytest.approx(best, abs=1e-9)


def test_layers_are_what_a_recipe_that_names_them_makes(tmp_path, tiny, text, monkeypatch):
    losses = [[9, 9, 0, 9, 9], [9, 9, 9, 0, 9], [9, 9, 9, 9, 0]]
    rows = [{"layer": layer, "losses": own, "standard_errors": own} for layer, own in enumerate(losses)]
    monkeypatch.setattr(searching, "loss_table", lambda *given: rows)
    result = compress(tiny, recipe(text, bytes=0.99, dtype="bfloat16"), tmp_path / "out", progress=False)
    assert [entry["choice"] for entry in result.stages[0]["result"]] == NAMES[2:]
    assert result.stages[0]["decision"]["targets"] == [2, 3, 4]

    plain = recipe(text, bytes=0.5, dtype="bfloat16").to_dict() | {
        "stages": [
            {"prune_ffn": {**PRUNE["prune_ffn"], "layers": [1, 2]}},
            SPARSE,
            {"quantize": {**INT8["quantize"], "layers": [2, 3]}},
        ]
    }
    compress(tiny, plain, tmp_path / "plain", progress=False)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "plain" / "config.json").read_text()


def test_a_searched_sparsity_is_the_mix_that_loses_least_at_the_bytes_of_one(tmp_path, tiny, text, monkeypatch):
    given = {"calibration": {"source": str(text), "samples": 12, "length": 48}}
    searched = {"sparsify": {"sparsity": 0.5, "allocation": "searched", "layers": [0, 2]}}
    losses = [[0, 1, 2, 3, 3.1, 3.2, 3.3], [0, 1, 2, 3, 6, 12, 24]]
    rows = [{"layer": layer, "losses": own, "standard_errors": own} for layer, own in enumerate(losses)]
    monkeypatch.setattr(searching, "loss_table", lambda *given: rows)
    result = compress(tiny, {**given, "stages": [searched]}, tmp_path / "out", progress=False)
    decision = result.stages[0]["decision"]
    assert decision["targets"] == [6, 0, None]
    assert [entry["sparsity"] for entry in result.stages[0]["result"]] == [0.8, 0.2]
    assert decision["choices"][0] == "sparsify sparsity=0.2" and decision["front"] and decision["table"] == [
        {**row, "costs": own["costs"]} for row, own in zip(rows, decision["table"], strict=True)
    ]
    uniform = {"sparsify": {"sparsity": 0.5, "layers": [0, 2]}}
    compress(tiny, {**given, "stages": [uniform]}, tmp_path / "uniform", progress=False)
    assert sum(block_bytes(tmp_path / "out")[:2]) <= decision["budget"] == sum(block_bytes(tmp_path / "uniform")[:2])
    each = [{"sparsify": {"sparsity": share, "layers": [layer, layer + 1]}} for layer, share in ((0, 0.8), (1, 0.2))]
    compress(tiny, {**given, "stages": each}, tmp_path / "each", progress=False)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "each"))
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (tmp_path / "out" / "front.png").is_file()


def test_reloads_with_the_front_beside_it(tmp_path, tiny, text):
    behind = {"quantize": {"bits": 4, "group_size": 16, "layers": [0, 2], "include": ["q_proj"]}}
    choices = [[], [{"factorize": {"ratio": 0.3, "align": 1, "exclude": ["q_proj"]}}]]
    settings = {"parameters": 0.9, "layers": [1, 3], "choices": choices}
    result = compress(tiny, recipe(text, behind, **settings), tmp_path / "out", progress=False)
    decision = result.stages[0]["decision"]
    assert decision["targets"][0] is None and 1 in decision["targets"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model(torch.arange(20).view(1, 20)).logits.isfinite().all()
    width, height = Image.open(tmp_path / "out" / "front.png").size
    assert width > height > 300
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == recipe(text, behind, **settings)
    front = decision["front"]
    assert front == sorted(front, key=lambda point: point["cost"])
    assert front == sorted(front, key=lambda point: -point["loss"])
    assert [point["cost"] for point in decision["uniform"]] == [
        sum(row["costs"][choice] for row in decision["table"]) for choice in (0, 1)
    ]


def test_interrupted_run_ends_with_the_same_bytes(tmp_path, tiny, text, monkeypatch):
    given = recipe(text, bytes=0.6)
    whole = compress(tiny, given, tmp_path / "whole", progress=False)

    def interrupt(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(searching, "knapsack_front", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny, given, tmp_path / "cut", progress=False)
    with monkeypatch.context() as patch:  # nothing is measured again
        patch.setattr("hf_llmkernel.compress.search.table.LossTable._fork", interrupt)
        again = compress(tiny, given, tmp_path / "cut", progress=False)
    assert again.stages == whole.stages
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert first == second


def test_latency_is_timed_once_a_kind_and_kept(tmp_path, tiny, text, monkeypatch):
    asked = []

    def milliseconds(layers, dtype):
        asked.append(len(layers))
        return [3.0 if layer.linear_form("q_proj").is_dense else 1.0 for layer in layers]

    def interrupt(*given):
        raise KeyboardInterrupt

    monkeypatch.setitem(costing.UNITS, "latency", milliseconds)
    given = recipe(text, latency=5.5, choices=[[], [SPARSE]])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(searching, "loss_table", interrupt)
        compress(tiny, given, tmp_path / "out", progress=False)
    result = compress(tiny, given, tmp_path / "out", progress=False)
    decision = result.stages[0]["decision"]
    assert asked == [2]
    assert decision["present"] == 9 and sorted(decision["targets"]) == [0, 1, 1] and decision["cost"] == 5


def test_decoding_is_timed_for_every_form(tiny):
    dense = own_layers(LLMKernelConfig.from_pretrained(tiny))[0]
    sparse, pruned = (own_layers(LLMKernelConfig.from_pretrained(tiny))[0] for _ in range(2))
    sparse.linear_forms = {"up_proj": {"sparsity": "bitmask", "nnz": 100, "bits": 8, "group_size": 16}}
    pruned.skip = ["attention"]
    times = costing.decode_milliseconds([dense, sparse, pruned], torch.bfloat16)
    assert all(0 < time < 1000 for time in times)


def test_preview_plans_the_dearest_choice_within_the_budget(tiny, text):
    def planned(**settings) -> str:
        (stage,) = preview(tiny, recipe(text, **settings)).stages
        (result,) = stage["result"]
        assert stage["estimated"] and result["layers"] == [0, 1, 2]
        return result["choice"]

    # A sparse fp32 layer takes its kept share and a 32nd.
    assert planned(bytes=0.99) == planned(bytes=0.79) == NAMES[1]
    assert planned(bytes=0.78) == planned(bytes=0.54) == NAMES[2]
    assert planned(bytes=round(0.54 * 3 * 37120)) == planned(latency=0.54) == NAMES[2]
    assert planned(latency=20) == NAMES[0]
    # 8-bit integers take a quarter of fp32.
    assert planned(bytes=0.4, choices=[[{"sparsify": {"sparsity": 0.7, "method": "magnitude"}}], [INT8]]) != NAMES[0]


def test_work_of_the_forks_is_counted(tiny, text):
    config = LLMKernelConfig.from_pretrained(tiny)
    stage = recipe(text, bytes=0.5, layers=[1, 3], choices=[[], [SPARSE], [INT8]], tokens=100).stages[0]
    products = 0
    for first in (1, 2):  # of either choice's states: the layers from its own on, and the head
        products += 2 * sum(100 * 9216 for _ in range(first, 3)) + 2 * 100 * 96 * 32
    assert stage.search_work(config) == (products, 4 * 100 * 32 * 4)


def test_budget_out_of_reach_names_the_least(tmp_path, tiny, text):
    def least(**settings) -> str:
        with pytest.raises(ValueError, match="the cheapest mix takes") as raised:
            compress(tiny, recipe(text, **settings), tmp_path / "out", progress=False)
        return str(raised.value).partition("takes ")[2].partition(";")[0]

    assert not (tmp_path / "out.part").exists()
    stated = {"choices": [[], [SPARSE]]}
    share = float(least(bytes=0.5, **stated))
    dense, sparse = 37120, 4 * (9216 // 2) + 9216 // 8 + 2 * 4 * 32  # kept values, mask, norms
    assert share == pytest.approx(sparse / dense, abs=1e-4)
    assert float(least(bytes=1000, **stated)) == 3 * sparse
    compress(tiny, recipe(text, bytes=3 * sparse, **stated), tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "0 are set; set exactly one"),
        ({"bytes": 0.5, "latency": 0.5}, "2 are set; set exactly one"),
        ({"bytes": 1.0}, "bytes=1.0: is all there is now"),
        ({"bytes": -1}, "bytes=-1: must be a share"),
        ({"bytes": 0.5, "tokens": 1}, "tokens=1: must be an integer of at least 2"),
        ({"bytes": 0.5, "include": ["q_proj"]}, "include and exclude: each stage of choices has its own"),
        ({"bytes": 0.5, "choices": [[]]}, "must be a list of at least two"),
        ({"bytes": 0.5, "choices": [[], SPARSE]}, r"choices\[1\]=.* must be a list of stages"),
        ({"bytes": 0.5, "choices": [[], [{"sparse": {}}]]}, r"choices\[1\]: .*unknown stage 'sparse'; the known ones"),
        ({"bytes": 0.5, "choices": [[], [{"quantize": {"bit": 8}}]]}, r"\[1\]: quantize: unknown keys \['bit'\]"),
        ({"bytes": 0.5, "choices": [[], [{"drop_layers": {"count": 1}}]]}, "drop_layers decides over all layers"),
        ({"bytes": 0.5, "choices": [[], [PRUNE, {"refit": {}}]]}, "refit compares with the uncompressed model; add it"),
        ({"bytes": 0.5, "choices": [[], [{"quantize": {"bits": 8, "layers": [0, 1]}}]]}, "set the layers of search"),
        ({"bytes": 0.5, "choices": [[], [{"quantize": {"bits": 8, "embeddings": True}}]]}, "embeddings=true; add a"),
    ],
)
def test_settings_that_cannot_be_are_named(text, settings, message):
    with pytest.raises(ValueError, match=message):
        recipe(text, **{"choices": [[], [INT8]], **settings})


def test_choice_that_does_not_fit_the_model_is_named(tmp_path, tiny, text):
    with pytest.raises(ValueError, match=r"search: choices\[1\]: quantize: layers.0.self_attn.q_proj is stored as int"):
        compress(tiny, recipe(text, bytes=0.5, choices=[[], [INT8, INT8]]), tmp_path / "out", progress=False)
    assert not (tmp_path / "out.part").exists()


def test_recipe_survives_json(text):
    given = recipe(text, bytes=0.5)
    assert Recipe.load(json.loads(json.dumps(given.to_dict()))) == given
