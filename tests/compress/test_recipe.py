"""Recipes: every way of writing one gives the same object, and mistakes are named."""

import json

import pytest
import yaml

from hf_llmkernel.compress import Calibration, Recipe
from hf_llmkernel.compress.prune.stage import PruneFFN
from hf_llmkernel.compress.quantize.stage import Quantize

WRITTEN = {
    "dtype": "bfloat16",
    "calibration": {"source": "bbc", "samples": 8},
    "stages": [{"prune_ffn": {"ratio": 0.25, "layers": [1, 4]}}, {"quantize": {"bits": 4, "exclude": ["o_proj"]}}],
}
BUILT = Recipe(
    stages=(PruneFFN(ratio=0.25, layers=(1, 4)), Quantize(bits=4, exclude=("o_proj",))),
    dtype="bfloat16",
    calibration=Calibration(source="bbc", samples=8),
)


@pytest.mark.parametrize(("ending", "write"), [("yaml", yaml.safe_dump), ("yml", yaml.safe_dump), ("json", json.dumps)])
def test_file_dictionary_and_dataclass_are_equal(tmp_path, ending, write):
    path = tmp_path / f"recipe.{ending}"
    path.write_text(write(WRITTEN))
    assert Recipe.load(path) == Recipe.load(str(path)) == Recipe.load(WRITTEN) == Recipe.load(BUILT) == BUILT


def test_saved_recipe_reads_back(tmp_path):
    BUILT.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == BUILT
    assert Recipe.load(json.loads(json.dumps(BUILT.to_dict()))) == BUILT


def test_a_stage_by_its_name_alone_takes_defaults_or_says_what_is_missing():
    with pytest.raises(ValueError, match="quantize: bits is missing; it has no default"):
        Recipe.load({"stages": ["quantize"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": []}, r"unknown keys \['stage'\]; the known ones are \['stages', 'dtype'"),
        ({"stages": []}, r"stages=\[\]"),
        ({"stages": [{"prune": {"ratio": 0.5}}]}, "unknown stage 'prune'; the known ones are .*'prune_ffn', "),
        ({"stages": [{"quantize": {"bit": 8}}]}, r"quantize: unknown keys \['bit'\]; the known ones are .*'bits'"),
        ({"stages": [{"quantize": {"bits": 8}, "prune_ffn": {}}]}, "must be one name with its settings"),
        ({"stages": [{"prune_ffn": {"ratio": 0}}]}, "prune_ffn: ratio=0"),
        ({"stages": [{"prune_ffn": [0.5]}]}, r"prune_ffn=\[0.5\]: must be a table"),
        ({"stages": [{"quantize": {"bits": 8, "method": ["rtn"]}}]}, r"method=\['rtn'\]: must be one text"),
        ({"stages": [{"sparsify": {"sparsity": 0.5, "method": ["wanda"]}}]}, r"method=\['wanda'\]: must be one text"),
        ({"stages": [{"prune_ffn": {"ratio": 0.5, "method": ["flap"]}}]}, r"method=\['flap'\]: must be one text"),
        ({"stages": [{"quantize": {"bits": 4, "method": "gptq", "dampening": True}}]}, "dampening=True: must be a num"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"calibration": {"sample": 3}}, r"calibration: unknown keys \['sample'\]; the known ones are .*'samples'"),
        ({"calibration": {"source": "bbc", "samples": 0}}, "samples=0"),
        ({"calibration": {}}, "prune_ffn looks at activations; name a text"),
        ({"evaluation": {"context": 1}}, "context=1"),
        ({"stages": [{"quantize": {"bits": 8, "group_size": -1}}]}, "group_size=-1: must be an integer .* or null f"),
        ({"stages": [{"quantize": {"bits": 4, "method": "awq"}}]}, r"method='awq': .*; 'awq' is a fold, .*fold: awq"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe.load({**WRITTEN, **change})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", "stages: [", "cannot be read"),
        ("recipe.json", "{", "cannot be read"),
        ("recipe.yaml", "- quantize: {bits: 8}", "is a list; a recipe is a table, with .* under `stages:`"),
        ("recipe.json", "1", "must be a table"),
        ("recipe.txt", "", "must be a .yaml, .yml or .json file"),
    ],
)
def test_unreadable_files_are_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.load(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        Recipe.load(tmp_path / "none.yaml")
