"""Mixed precision: bits and group sizes as choices of `search`, the best mix within a budget of bytes."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_llmkernel.checkpoint.model_folder import ModelFolder
from hf_llmkernel.compress import Recipe, compress

GRIDS = [
    {"bits": 8, "group_size": 16},
    {"bits": 4, "group_size": 16, "symmetric": False, "zero_point_dtype": "float16", "method": "coordinate_descent"},
    {"bits": 4, "group_size": 32, "fold": "awq"},
    {"bits": 4, "group_size": None},
]


@pytest.fixture(scope="module")
def found(tiny, text, tmp_path_factory):
    """The folder and the result of a search over grids, within half a byte and some for scales a weight."""
    weights = sum(linear.numel() for name, linear in load_file(tiny / "model.safetensors").items() if "_proj" in name)
    recipe = {
        "calibration": {"source": str(text), "samples": 8, "length": 48},
        "stages": [
            {
                "search": {
                    "choices": [[{"quantize": grid}] for grid in GRIDS],
                    "bytes": round(weights * 6 / 8),  # six bits a weight
                    "tokens": 384,
                }
            }
        ],
    }
    folder = tmp_path_factory.mktemp("search") / "out"
    return folder, compress(tiny, Recipe.load(recipe), folder, progress=False)


def test_finer_grids_lose_less_and_cost_more(found):
    table = found[1].stages[0]["decision"]["table"]
    losses, costs = ([sum(row[key][choice] for row in table) for choice in range(4)] for key in ("losses", "costs"))
    assert costs == sorted(costs, reverse=True)
    assert losses[0] < min(losses[1:]) and losses[3] > max(losses[:3])


def test_the_mix_is_the_best_within_the_budget(found):
    decision = found[1].stages[0]["decision"]
    table = decision["table"]
    mixes = [
        (
            sum(row["losses"][choice] for row, choice in zip(table, mix, strict=True)),
            sum(row["costs"][choice] for row, choice in zip(table, mix, strict=True)),
        )
        for mix in itertools.product(range(4), repeat=3)
    ]
    best = min(loss for loss, cost in mixes if cost <= decision["budget"])
    assert decision["predicted_loss"] == pytest.approx(best, abs=1e-9)
    assert decision["cost"] <= decision["budget"]


def test_every_layer_is_stored_as_chosen_and_loads(found):
    folder, result = found
    layers = ModelFolder(folder).config.per_layer_config
    for layer, choice in zip(layers, result.stages[0]["decision"]["targets"], strict=True):
        form = layer.linear_form("down_proj")
        assert (form.bits, form.group_size) == (GRIDS[choice]["bits"], GRIDS[choice]["group_size"])
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert model.eval()(torch.arange(20).view(1, 20)).logits.isfinite().all()
