"""A checkpoint part by part against the model that `from_pretrained` makes of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM, LLMKernelModel
from hf_llmkernel.checkpoint.model_folder import ModelFolder, Positions, stored_as
from hf_llmkernel.compress.plan import keep_layers

SHAPE = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
INT8 = {"bits": 8, "group_size": 16}
KINDS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "tied_packed": {"tie_word_embeddings": True, "embed_tokens_form": INT8},
    "untied_packed": {"embed_tokens_form": INT8, "lm_head_form": {"rank": 8, "a": INT8}},
    "per_layer": {
        "per_layer_config": {
            0: {"skip": ["attention"]},
            1: {"linear_forms": {"up_proj": {"rank": 4, "b": {"bits": 4, "group_size": 4}}}, "intermediate_size": 48},
        },
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}
IDS = torch.randint(70, (2, 11), generator=torch.Generator().manual_seed(0))


def save(folder: Path, kind: str, model_class=LLMKernelForCausalLM, dtype=torch.float32):
    torch.manual_seed(0)
    model = model_class(LLMKernelConfig(**{**SHAPE, **KINDS[kind]})).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def damaged(folder: Path, target: Path, change) -> Path:
    """A copy whose tensors were changed."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@torch.no_grad()
def run(source: ModelFolder, ids: torch.Tensor) -> torch.Tensor:
    """The model put together from its parts, up to the last norm."""
    positions = Positions(source.config, ids.shape[1])
    hidden = source.embedding()(ids)
    for index in range(source.config.num_hidden_layers):
        hidden = source.block(index)(hidden, **positions.arguments(index))
    return source.norm()(hidden)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_parts_make_the_model(kind, tmp_path):
    model = save(tmp_path / "model", kind)
    source = ModelFolder(tmp_path / "model")
    hidden = run(source, IDS)
    torch.testing.assert_close(hidden, model.model(IDS)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(source.head()(hidden), model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert source.has_head and source.dtype == torch.float32


@torch.no_grad()
def test_low_precision_is_computed_in_fp32(tmp_path):
    model = save(tmp_path / "model", "untied", dtype=torch.bfloat16)
    source = ModelFolder(tmp_path / "model")
    assert source.dtype == torch.bfloat16
    assert source.block_tensors(0)["mlp.up_proj.weight"].dtype == torch.bfloat16
    hidden = run(source, IDS)
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, model.float().model(IDS)[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_body_alone_has_no_head(tmp_path):
    model = save(tmp_path / "model", "tied", LLMKernelModel)
    source = ModelFolder(tmp_path / "model")
    assert source.prefix == "" and not source.has_head
    assert set(source.others) == {"embed_tokens.weight", "norm.weight"}
    torch.testing.assert_close(run(source, IDS), model(IDS)[0], rtol=1e-5, atol=1e-5)


def test_a_missing_head_is_named(tmp_path):
    save(tmp_path / "model", "untied", LLMKernelModel)
    source = ModelFolder(tmp_path / "model")
    with pytest.raises(ValueError, match="model: has no language-model head, so no perplexity; use a causal model"):
        source.head()


def test_layers_that_the_configuration_does_not_have_are_named(tmp_path):
    save(tmp_path / "model", "tied")

    def add(tensors):
        tensors["model.layers.5.input_layernorm.weight"] = torch.ones(32)

    with pytest.raises(ValueError, match=r"^model.layers.5.input_layernorm.weight: config.json has 3 layers only"):
        ModelFolder(damaged(tmp_path / "model", tmp_path / "stray", add))


@torch.no_grad()
def test_a_restricted_folder_has_the_layers_that_stay(tmp_path):
    model = save(tmp_path / "model", "per_layer")
    source = ModelFolder(tmp_path / "model")
    fewer = source.restricted(keep_layers(source.config, [1, 2]), [1, 2])
    assert (fewer.config.num_hidden_layers, source.config.num_hidden_layers) == (2, 3)
    assert fewer.layer_config(0).intermediate_size == 48 and fewer.layer_config(1).intermediate_size == 64
    assert set(fewer.block_tensors(0)) == set(source.block_tensors(1))
    last = fewer.restricted(keep_layers(fewer.config, [1]), [1])
    assert torch.equal(last.block_tensors(0)["mlp.up_proj.weight"], source.block_tensors(2)["mlp.up_proj.weight"])
    model.model.layers = model.model.layers[1:]
    model.config.layer_types = fewer.config.layer_types
    positions = Positions(source.config, IDS.shape[1])
    expected = model.model.embed_tokens(IDS)
    for index, layer in enumerate(model.model.layers):
        expected = layer(expected, **positions.arguments(index + 1))
    torch.testing.assert_close(run(fewer, IDS), model.model.norm(expected), rtol=1e-5, atol=1e-5)


def test_a_layers_configuration_is_a_copy(tmp_path):
    save(tmp_path / "model", "per_layer")
    source = ModelFolder(tmp_path / "model")
    source.layer_config(1).intermediate_size = 8
    source.layer_config(1).linear_forms.clear()
    assert source.layer_config(1).intermediate_size == 48 and source.layer_config(1).linear_forms


def test_a_configuration_without_dtype_takes_the_tensors(tmp_path):
    save(tmp_path / "model", "untied", dtype=torch.float16)
    path = tmp_path / "model" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in fields.items() if key not in ("dtype", "torch_dtype")}))
    assert ModelFolder(tmp_path / "model").dtype == torch.float16


def test_values_beyond_a_dtype_are_named():
    assert stored_as("w", torch.tensor([1.5]), torch.float16).dtype == torch.float16
    assert stored_as("w.scales", torch.tensor([1.5]), torch.float16).dtype == torch.float32
    assert stored_as("w", torch.tensor([1], dtype=torch.uint8), torch.float16).dtype == torch.uint8
    with pytest.raises(ValueError, match=r"dtype=float16: w has values beyond its range, up to 1e\+06; choose"):
        stored_as("w", torch.tensor([1.0, -1e6]), torch.float16)
