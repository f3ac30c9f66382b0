"""Models whose blocks come from the files, against the same ones in memory: bit-equal, and never more at once."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_llmkernel.generate import paging
from hf_llmkernel.generate.paging import load_paged, pinned_blocks
from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

IDS = torch.arange(5, 25).view(2, 10)
FIELDS = {
    "dense": {},
    "untied": {"tie_word_embeddings": False, "attention_bias": True, "qk_norm": True},
    "packed": {
        "linear_forms": {
            "q_proj": {"rank": 8}, "up_proj": {"bits": 4, "group_size": 16}, "down_proj": {"sparsity": "2:4"},
            "o_proj": {"sparsity": "bitmask", "nnz": 500, "bits": 8},
        },
        "embed_tokens_form": {"bits": 8, "group_size": 16},
    },
    "uneven": {"per_layer_config": {1: {"intermediate_size": 96}, 2: {"skip": ["attention"]}}},
}  # fmt: skip


def save(folder, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = LLMKernelConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=5, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, **{"tie_word_embeddings": True, **fields},
    )  # fmt: skip
    LLMKernelForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size="30KB")


@pytest.fixture
def pins(monkeypatch):
    """Makes `load_paged` pin a number of blocks."""
    return lambda count: monkeypatch.setattr(paging, "pinned_blocks", lambda *sizes: count)


def tokens(model):
    return model.generate(IDS, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("pinned", [0, 1, 4, 5])
@pytest.mark.parametrize("name", FIELDS)
def test_paged_models_compute_the_same(tmp_path, pins, name, pinned):
    save(tmp_path, **FIELDS[name])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    pins(pinned)
    model = load_paged(tmp_path, 1)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
        assert torch.equal(model(IDS[:1, :3]).logits, expected(IDS[:1, :3]).logits)
    assert torch.equal(tokens(model), tokens(expected))
    paged = [any(parameter.is_meta for parameter in layer.parameters()) for layer in model.model.layers]
    assert paged == [False] * pinned + [True] * (5 - pinned)


def test_bf16_and_what_was_read(tmp_path, pins):
    save(tmp_path, torch.bfloat16)
    pins(2)
    model = load_paged(tmp_path, 1)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits)
    model.pages._ahead[1].result()
    block = model.pages.blocks[2].nbytes
    assert block == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 64)
    assert model.pages.bytes_read == 4 * block  # three, and the first of the next step


def test_what_fits_is_pinned(monkeypatch):
    class Process:
        def memory_info(self):
            return type("Info", (), {"rss": 1000})

    monkeypatch.setattr(paging.psutil, "Process", Process)
    monkeypatch.setattr(paging, "RESERVE_BYTES", 0)
    monkeypatch.setattr(paging, "ALIGNMENT", 0)
    sizes = [100, 50, 100, 100]
    assert [pinned_blocks(sizes, 20, memory) for memory in (1370, 1369, 1319, 1220)] == [4, 1, 0, 0]
    with pytest.raises(ValueError, match=r"memory=1.22 kB: the interpreter .*, the embedding and two blocks need 10MB"):
        pinned_blocks(sizes, 20, 1219)


def test_damage_is_named(tmp_path, pins):
    save(tmp_path)
    pins(0)
    model = load_paged(tmp_path, 1)
    file = model.pages.blocks[4].extents[0].path
    with file.open("r+b") as opened:
        opened.truncate(os.path.getsize(file) // 2)
    with pytest.raises(OSError, match="ends at byte .*; fetch or write it again"), torch.no_grad():
        for _ in range(2):
            model(IDS)
    with pytest.raises(ValueError):
        load_paged(tmp_path, 1)
    (tmp_path / "whole").mkdir()
    save(tmp_path / "whole")
    config = LLMKernelConfig.from_pretrained(tmp_path / "whole")
    config.intermediate_size = 48
    config.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.weight: has shape \[32, 64\], config.json says"):
        load_paged(tmp_path / "whole", 1)
