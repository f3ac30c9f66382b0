"""The stage `cast`: values, counts and errors against numpy's float16 and the definition of bfloat16."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_llmkernel import compress
from hf_llmkernel.checkpoint.model_folder import ModelFolder
from hf_llmkernel.checkpoint.precision import cast_values
from hf_llmkernel.compress.cast import Cast, Precision
from hf_llmkernel.compress.plan import plan_stages
from hf_llmkernel.compress.recipe import Recipe
from tests.compress.conftest import save_tiny

NORM = "model.norm.weight"


@pytest.fixture
def source(tmp_path):
    """A checkpoint with values in one norm that float16 cannot hold, or holds badly."""
    save_tiny(tmp_path / "source")
    tensors = load_file(tmp_path / "source/model.safetensors")
    tensors[NORM][:6] = torch.tensor([1e5, -7e4, 1e-9, -1e-8, 1e-6, 3.1e-5])
    save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    return tmp_path / "source"


def test_counts_and_values_are_numpys():
    torch.manual_seed(0)
    values = torch.randn(4000) * torch.logspace(-10, 6, 4000)
    rounded, lost = cast_values(values, torch.float16)
    with np.errstate(over="ignore"):
        expected = values.numpy().astype(np.float16)
    beyond = np.isinf(expected)
    assert lost["overflowed"] == beyond.sum() > 100
    assert lost["underflowed"] == ((expected == 0) & (values.numpy() != 0)).sum() > 100
    small = (np.abs(expected) < 2.0**-14) & (expected != 0) & (expected.astype(np.float32) != values.numpy())
    assert lost["subnormal"] == small.sum() > 100
    expected[beyond] = np.sign(values.numpy()[beyond]) * np.float16(65504)
    assert torch.equal(rounded, torch.from_numpy(expected))


def test_bfloat16_keeps_the_range():
    values = torch.tensor([1e38, -3.4e38, 3.4028235e38, 1e-38, 0.0])
    rounded, lost = cast_values(values, torch.bfloat16)
    assert lost == {"overflowed": 2, "underflowed": 0, "subnormal": 1}
    assert rounded.isfinite().all() and rounded[1] == -torch.finfo(torch.bfloat16).max


def test_pieces_are_one_tensor():
    precision = Precision(Cast(dtype="float16", overflow="clamp"))
    pieces = list(precision.blocks("a", [torch.tensor([1e5, 1.0]), torch.tensor([1e-9]), torch.empty(0)]))
    assert torch.equal(torch.cat(pieces), torch.tensor([65504.0, 1.0, 0.0]).half())
    entry = {"tensor": "a", "overflowed": 1, "underflowed": 1, "subnormal": 0, "largest": 1e5}
    assert precision.summary()["tensors"] == [entry] and precision.summary()["values"] == 3


def test_values_beyond_the_range_are_refused_before_any_work(source, tmp_path):
    with pytest.raises(
        ValueError, match=r"cast: model.norm.weight has values beyond the range of float16, up to 1e\+05"
    ):
        compress(source, {"stages": [{"cast": {"dtype": "float16"}}]}, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_clamped_counted_and_written(source, tmp_path):
    recipe = {"stages": [{"cast": {"dtype": "float16", "overflow": "clamp"}}]}
    result = compress(source, recipe, tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out/precision.json").read_text())
    assert written == result.precision
    (entry,) = [tensor for tensor in written["tensors"] if tensor["tensor"] == NORM]
    assert entry == {"tensor": NORM, "overflowed": 2, "underflowed": 2, "subnormal": 2, "largest": 1e5}
    assert (written["overflowed"], written["dtype"], written["overflow"]) == (2, "float16", "clamp")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert written["values"] == sum(tensor.numel() for tensor in before.values())
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.clamp(-65504, 65504).half())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16 and model.model.norm.weight[0] == 65504


def test_integers_keep_their_scales_and_bitsandbytes_may_follow(tmp_path):
    save_tiny(tmp_path / "source", hidden_size=64)
    stages = [{"quantize": {"bits": 8, "scale_dtype": "float32"}}, {"cast": {"dtype": "bfloat16"}}]
    compress(tmp_path / "source", {"stages": stages}, tmp_path / "int8", progress=False)
    tensors = load_file(tmp_path / "int8/model.safetensors")
    assert {t.dtype for name, t in tensors.items() if name.endswith("scales")} == {torch.float32}
    assert {t.dtype for name, t in tensors.items() if name.endswith("weight")} == {torch.bfloat16}
    stages = [{"cast": {"dtype": "float16"}}, {"bitsandbytes": {}}]
    compress(tmp_path / "source", {"stages": stages}, tmp_path / "nf4", progress=False)
    quantized = load_file(tmp_path / "nf4/model.safetensors")
    state = quantized["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"]
    assert json.loads(bytes(state.tolist()))["dtype"] == "float16"
    assert quantized["model.norm.weight"].dtype == torch.float16


UP = "model.layers.1.mlp.up_proj"
CLAMPED = {"cast": {"dtype": "float16", "overflow": "clamp"}}
BEYOND = {
    "integers": ("up_proj", "float16", [{"quantize": {"bits": 8}}]),
    "their scales in fp32": ("up_proj", "float16", [{"quantize": {"bits": 4, "scale_dtype": "float32"}}]),
    "low ranks": ("up_proj", "float16", [{"factorize": {"ratio": 0.3, "method": "svd", "include": ["up_proj"]}}]),
    "an embedding": ("embed", "float16", [{"quantize": {"bits": 8, "exclude": ["*"], "embeddings": True}}]),
    "integers, what floats clamped": ("up_proj", None, [{"quantize": {"bits": 8}}, CLAMPED]),
    "an embedding, what floats clamped": ("embed", None, [{"quantize": {"bits": 8, "embeddings": True}}, CLAMPED]),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_integers_and_low_ranks_stand_for_is_refused_beyond_the_range(tmp_path, case):
    where, dtype, stages = BEYOND[case]
    save_tiny(tmp_path / "source")
    tensors = load_file(tmp_path / "source/model.safetensors")
    tensors[f"{UP}.weight" if where == "up_proj" else "model.embed_tokens.weight"][3, 5] = -2e5
    save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    name = UP if where == "up_proj" else "model.embed_tokens"
    with pytest.raises(ValueError, match=rf"^dtype=float16: {name} stands for values up to 2e\+05, .*; choose b"):
        compress(tmp_path / "source", {"dtype": dtype, "stages": stages}, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_plan_is_in_the_new_bytes(tiny):
    stages = Recipe.load({"stages": [{"cast": {"dtype": "bfloat16"}}]}).stages
    config = ModelFolder(tiny).config
    (planned,) = plan_stages(config, stages, torch.float32)
    assert planned.weight_bytes == 2 * planned.parameters and planned.config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        ([{"cast": {}}], "cast: dtype is missing; it has no default"),
        ([{"cast": {"dtype": "float16"}}, {"cast": {"dtype": "bfloat16"}}], "cast: comes twice, and works when all is"),
        ([{"cast": {"dtype": "float32"}}], "dtype='float32': must be one of"),
        ([{"cast": {"dtype": "float16", "overflow": "wrap"}}], "overflow='wrap': must be one of"),
        ([{"cast": {"dtype": "float16", "include": ["q_proj"]}}], "include, exclude and layers: a model has one dtype"),
        ([{"cast": {"dtype": "float16"}}, {"quantize": {"bits": 8}}], "quantize: comes behind cast"),
        ([{"bitsandbytes": {}}, {"cast": {"dtype": "float16"}}], "cast: comes after the stage bitsandbytes"),
    ],
)
def test_bad_settings_are_refused(tiny, tmp_path, stages, fault):
    with pytest.raises(ValueError, match=fault):
        compress(tiny, {"stages": stages}, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())
