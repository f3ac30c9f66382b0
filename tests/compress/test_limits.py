"""What cannot be compressed says why before any work, and what is singular is dampened and told."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_llmkernel.compress import Recipe, compress

from .conftest import save_tiny
from .test_pipeline import IDS, recipe_for


@pytest.mark.parametrize(
    ("fields", "stage", "message"),
    [
        ({}, {"prune_heads": {"ratio": 0.1}}, r"prune_heads: ratio=0.1: of 4 heads leaves 3.6, nearest .* 2 4 \(2 kv"),
        (
            {"num_key_value_heads": 1},
            {"prune_heads": {"ratio": 0.5}},
            r"of 4 heads leaves 2, nearest multiple of 4 0 \(1 kv heads, scheme='groups'\); change ratio or scheme",
        ),
        ({}, {"prune_ffn": {"ratio": 0.1, "align": 16}}, "of 64 leaves 57.6, nearest multiple of align=16 64; change"),
        (
            {},
            {"factorize": {"ratio": 0.2, "method": "svd", "align": 16}},
            "factorize: q_proj: align=16: no rank .* of a 32 x 32 linear, break-even is 15; lower align or exclude",
        ),
        ({}, {"sparsify": {"pattern": "3:4", "sparsity": 0.5, "method": "magnitude"}}, "pattern='3:4'"),
        (
            {},
            {"sparsify": {"sparsity": 0.02, "method": "magnitude"}},
            "sparsify: sparsity=0.02: q_proj would take 4096 bytes, dense it takes 4096: .* remove more than 0.03125",
        ),
        (
            {},
            {"sparsify": {"pattern": "63:64", "include": ["down_proj"]}},
            "sparsify: pattern='63:64': down_proj would take 8320 bytes, dense it takes 8192: a mask costs one bit",
        ),
        (
            {},
            {"sparsify": {"sparsity": 0.1, "span": 0.08, "allocation": "owl"}},
            "sparsify: sparsity=0.02: q_proj would take 4096 bytes",
        ),
        (
            {},
            {"sparsify": {"pattern": "2:64"}},
            "sparsify: pattern='2:64': q_proj has 32 columns, fewer than a group; take smaller groups, or exclude it",
        ),
        ({}, {"sparsify": {"sparsity": 0.5, "span": 0.1}}, "span=0.1: allocation='uniform' knows none; leave it out"),
        (
            {},
            {"factorize": {"energy": 0.9999, "align": 4, "method": "svd"}},
            "factorize: energy=0.9999: no linear keeps so much at a rank that saves parameters; lower it",
        ),
        ({}, {"quantize": {"bits": 8, "include": ["fc1"]}}, "'fc1' matches no linear; those of this model are"),
    ],
)
def test_a_model_that_a_stage_does_not_fit_is_refused(tmp_path, text, fields, stage, message):
    save_tiny(tmp_path / "dense", **fields)
    with pytest.raises(ValueError, match=message) as error:
        compress(tmp_path / "dense", recipe_for(text, stage), tmp_path / "out", progress=False)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, True, "half", float("nan")])
@pytest.mark.parametrize("stage", ["prune_ffn", "prune_heads", "prune_hidden", "factorize"])
def test_a_ratio_is_above_0_and_below_1(stage, ratio):
    with pytest.raises(ValueError, match=rf"{stage}: ratio={ratio!r}.*: must be above 0 and below 1"):
        Recipe.load({"calibration": {"source": "bbc"}, "stages": [{stage: {"ratio": ratio}}]})


@pytest.mark.parametrize("sparsity", [0, 1, -0.5, True, "half", float("nan"), None])
def test_a_sparsity_is_above_0_and_below_1(sparsity):
    with pytest.raises(ValueError, match=f"sparsify: sparsity={sparsity!r}"):
        Recipe.load({"calibration": {"source": "bbc"}, "stages": [{"sparsify": {"sparsity": sparsity}}]})


@pytest.mark.parametrize("content", ["", "\n\n\n", "w1 w2"])
def test_a_calibration_text_without_text_is_refused(tmp_path, tiny, content):
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(ValueError) as error:
        compress(tiny, recipe_for(tmp_path / "empty.txt", {"prune_heads": {"ratio": 0.5}}), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


SINGULAR = {
    "prune_ffn": {"ratio": 0.25, "align": 16, "method": "magnitude", "dampening": 0},
    "prune_heads": {"ratio": 0.5, "method": "magnitude", "dampening": 0},
}


@pytest.mark.parametrize("stage", SINGULAR)
def test_dead_inputs_raise_the_dampening_and_it_is_noted(tmp_path, text, stage):
    """Half of what enters down_proj and o_proj of layer 1 is zero, more than is removed."""
    model = save_tiny(tmp_path / "dense")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[::2] = 0
        model.model.layers[1].self_attn.v_proj.weight[::2] = 0
    model.save_pretrained(tmp_path / "dense")
    result = compress(tmp_path / "dense", recipe_for(text, {stage: SINGULAR[stage]}), tmp_path / "out", progress=False)
    ((layer, used),) = [(note["layer"], note["dampening"]) for note in result.notes if "dampening" in note]
    assert layer == 1 and 0 < used <= 1
    compressed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert compressed(IDS).logits.isfinite().all()


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_dead_inputs_are_no_fault_of_a_sparse_weight(tmp_path, text, method):
    """Their weights go; nothing is raised, and nothing is told."""
    model = save_tiny(tmp_path / "dense")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:8] = 0
    model.save_pretrained(tmp_path / "dense")
    stage = {"sparsify": {"sparsity": 0.5, "method": method, "include": ["down_proj"]}}
    result = compress(tmp_path / "dense", recipe_for(text, stage), tmp_path / "out", progress=False)
    assert not [note for note in result.notes if "dampening" in note]
    assert [note["matrix"] for note in result.notes] == ["down_proj"] * 3
    assert all(0 < note["loss"] < 1 for note in result.notes)
    down = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].mlp.down_proj.dense_weight()
    assert not down[:, :8].any() and int((down != 0).sum()) == down.numel() // 2
