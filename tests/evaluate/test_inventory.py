"""Inventories against sums over the model's own state, and every contradiction between a config and its tensors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from hf_llmkernel.evaluate import inspect
from hf_llmkernel.evaluate.inventory_table import render_inventory

from .conftest import edit_config


def entry_of(inventory, name):
    return next(entry for entry in inventory.entries if entry.name == name)


def edit_tensors(folder, edit) -> None:
    """Applies `edit` to the tensors of a folder and writes them back."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_a_stock_model_counts_what_torch_counts(saved, llama):
    inventory = inspect(saved / "llama")
    assert inventory.model_type == "llama"
    assert inventory.parameters == inventory.dense_parameters == sum(p.numel() for p in llama.parameters())
    assert inventory.bytes == 4 * inventory.parameters
    assert inventory.bytes_on_disk == (saved / "llama" / "model.safetensors").stat().st_size
    assert inventory.compressed == 0 and not inventory.verified
    entry = entry_of(inventory, "model.layers.2.mlp.down_proj")
    assert (entry.shape, entry.form, entry.parameters) == ((32, 64), "dense float32", 2048)


def test_modules_come_in_the_order_of_the_computation(saved):
    names = [entry.name for entry in inspect(saved / "llama").entries]
    assert names[0] == "model.embed_tokens" and names[-2:] == ["model.norm", "lm_head"]
    layer = [name.removeprefix("model.layers.1.") for name in names if name.startswith("model.layers.1.")]
    assert layer == ["input_layernorm"] + [f"self_attn.{name}_proj" for name in "qkvo"] + [
        "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    ]  # fmt: skip


def test_a_compressed_model_counts_values_bytes_sparsity_and_rank(saved, compressed):
    inventory = inspect(saved / "compressed")
    state = compressed.state_dict()
    assert inventory.bytes == sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    entries = {entry.name.removeprefix("model.layers.0."): entry for entry in inventory.entries}
    rows = {
        "self_attn.q_proj": ("int8 g16", 32 * 32, 0.0, None),
        "self_attn.k_proj": ("2:4 int4 per row", 16 * 16, 0.5, None),
        "self_attn.v_proj": ("rank 4 (int8 per row, bitmask float32)", 4 * 32 + 30, 1 - 158 / (4 * 48), 4),
        "self_attn.o_proj": ("bitmask float32", 500, 1 - 500 / 1024, None),
        "mlp.up_proj": ("rank 8 (dense float32, dense float32)", 8 * 96, 0.0, 8),
        "mlp.gate_proj": ("dense float32", 64 * 32, 0.0, None),
        "mlp.down_proj": ("int4 g16 asymmetric", 64 * 32, 0.0, None),
    }
    for name, (form, parameters, sparsity, rank) in rows.items():
        entry = entries[name]
        assert (entry.form, entry.parameters, entry.rank) == (form, parameters, rank), name
        assert entry.sparsity == pytest.approx(sparsity), name
        stored = [tensor for key, tensor in state.items() if key.startswith(f"model.layers.0.{name}.")]
        assert entry.bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored), name
    assert entry_of(inventory, "model.layers.1.mlp.down_proj").shape == (32, 48)
    assert not [entry for entry in inventory.entries if entry.name.startswith("model.layers.2.self_attn")]
    assert inventory.compressed == 1 + 6 + 0 + 2  # the embedding, and those of each layer
    assert inventory.parameters < inventory.dense_parameters


def test_a_model_in_memory_has_the_inventory_of_its_folder(saved, compressed):
    memory, disk = inspect(compressed), inspect(saved / "compressed")
    assert memory.entries == disk.entries
    assert memory.bytes_on_disk is None


def test_tied_embeddings_count_once(tmp_path, llama):
    config = llama.config.__class__(**{**llama.config.to_dict(), "tie_word_embeddings": True})
    model = type(llama)(config)
    model.save_pretrained(tmp_path)
    for inventory in (inspect(tmp_path), inspect(model)):
        assert inventory.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert not [entry for entry in inventory.entries if entry.name == "lm_head"]


def test_families_of_another_shape_are_listed_as_they_are(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    model.save_pretrained(tmp_path)
    inventory = inspect(tmp_path)
    assert inventory.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert entry_of(inventory, "transformer.h.0.attn.c_attn").parameters == 16 * 48 + 48


def test_verification_reads_the_weights(saved):
    assert inspect(saved / "llama", verify=True, progress=False).verified
    assert inspect(saved / "compressed", verify=True, progress=False).verified


def test_verification_finds_values_that_are_not_finite(llama_folder):
    edit_tensors(llama_folder, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][2].fill_(torch.inf))
    inspect(llama_folder)
    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj.weight: holds an infinity"):
        inspect(llama_folder, verify=True, progress=False)


@pytest.mark.parametrize("name", ["self_attn.o_proj.mask", "self_attn.v_proj.b.mask", "self_attn.k_proj.mask"])
def test_verification_finds_masks_of_another_population(compressed_folder, name):
    key = f"model.layers.0.{name}"
    edit_tensors(compressed_folder, lambda tensors: tensors[key][:1, :1].bitwise_xor_(torch.tensor(1).byte()))
    inspect(compressed_folder)
    with pytest.raises(ValueError, match=f"{key}: "):
        inspect(compressed_folder, verify=True, progress=False)


def test_shapes_that_contradict_the_config(llama_folder):
    edit_config(llama_folder, intermediate_size=96)
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate_proj.weight: is \[64, 32\] in the weights and \[96, 32\]"):
        inspect(llama_folder)


def test_layers_beyond_the_config(llama_folder):
    edit_config(llama_folder, num_hidden_layers=2, layer_types=None)
    with pytest.raises(ValueError, match=r"model.layers.2.*num_hidden_layers=2"):
        inspect(llama_folder)


@pytest.mark.parametrize("key", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor(llama_folder, key):
    edit_tensors(llama_folder, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=f"{key}: missing in the weights"):
        inspect(llama_folder)


@pytest.mark.parametrize("name", ["q_proj.scales", "k_proj.mask", "v_proj.b.values", "o_proj.values"])
def test_a_missing_part_of_a_compressed_linear(compressed_folder, name):
    key = f"model.layers.0.self_attn.{name}"
    edit_tensors(compressed_folder, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=f"{key}: missing in the weights"):
        inspect(compressed_folder)


def test_another_dtype_or_part_than_the_form_stores(compressed_folder):
    key = "model.layers.0.self_attn.q_proj.scales"

    def widen(tensors):
        tensors[key] = tensors[key].float()

    edit_tensors(compressed_folder, widen)
    with pytest.raises(ValueError, match=f"{key}: is float32, its form stores float16"):
        inspect(compressed_folder)


def test_a_part_that_the_form_does_not_store(compressed_folder):
    edit_tensors(
        compressed_folder,
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.zero_points": torch.zeros(32, 2)}),
    )
    with pytest.raises(ValueError, match="q_proj.zero_points: is stored, but config.json makes this linear int8 g16"):
        inspect(compressed_folder)


def test_an_unknown_key_in_a_form(compressed_folder):
    config = json.loads((compressed_folder / "config.json").read_text())
    config["linear_forms"]["q_proj"]["groups"] = 4
    edit_config(compressed_folder, linear_forms=config["linear_forms"])
    with pytest.raises(ValueError, match=r"config.json: .*unknown keys \['groups'\].*the known ones are") as error:
        inspect(compressed_folder)
    assert "\n" not in str(error.value)


def test_damaged_files(llama_folder, tmp_path):
    weights = llama_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        inspect(llama_folder)
    weights.unlink()
    with pytest.raises(ValueError, match=str(llama_folder)):
        inspect(llama_folder)
    (llama_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: cannot be read"):
        inspect(llama_folder)
    with pytest.raises(ValueError, match="has no config.json"):
        inspect(tmp_path)
    with pytest.raises(ValueError, match="is no folder of a checkpoint"):
        inspect(tmp_path / "missing")


def test_the_table_joins_layers_that_are_alike(saved):
    inventory = inspect(saved / "compressed")
    lines = render_inventory(inventory).splitlines()
    assert any("model.layers.0,2.mlp.down_proj" in line and "int4 g16 asymmetric" in line for line in lines)
    assert any("model.layers.1.mlp.down_proj" in line and "32 x 48" in line for line in lines)
    row = next(line for line in lines if "layers.0.self_attn.o_proj" in line)
    assert row.split()[-1] == "51.2%"
    full = render_inventory(inventory, full=True).splitlines()
    assert len(full) == len(inventory.entries) + 4
    assert "parameters stored of" in lines[-1] and "on disk" in lines[-1]
