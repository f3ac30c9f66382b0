"""Tiny stock checkpoints with the odd features of their families, as other tools write them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PREFIXES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}

# name: (family, what differs from BASE)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_biases_llama3": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama_tied_wide_heads_linear": ("llama", {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": LINEAR}),
    "llama_dynamic_beyond_length": ("llama", {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}),
    "mistral_window": ("mistral", {"sliding_window": 7, "head_dim": 12}),
    "mistral_full_yarn": ("mistral", {"sliding_window": None, "rope_parameters": YARN}),
    "qwen2_some_layers_slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rope_parameters": YARN},
    ),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3_biases_last_layer_slides": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
    "qwen3_tied_narrow_heads": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}


def stock_model(family: str, head: str = "ForCausalLM", **changes: Any) -> transformers.PreTrainedModel:
    """A random stock model whose biases and norms matter."""
    prefix = PREFIXES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**BASE, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, prefix + head)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def save_stock(folder: Path, family: str = "llama", shards: str = "60KB", head: str = "ForCausalLM", **changes: Any):
    """Saves such a model in several shards and returns it."""
    model = stock_model(family, head, **changes)
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes fields of a config.json; `...` removes one."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def hashes(folder: Path) -> dict[str, str]:
    """The content of every file of a folder, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def padded_batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[3, 23]` and a mask with 0, 5 and 11 positions of padding on one side."""
    ids = torch.randint(3, 97, (3, 23), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 5, 11)):
        if count:
            mask[row, slice(0, count) if side == "left" else slice(-count, None)] = 0
    return ids.where(mask.bool(), 0), mask
