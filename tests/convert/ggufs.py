"""Tiny GGUF files, laid out as llama.cpp's converter lays them out."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from hf_llmkernel.convert.gguf_file import LAYER_NAMES, TOP_NAMES

from .sources import stock_model

Q8 = gguf.GGMLQuantizationType.Q8_0
GGUF_BASE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of Llama."""
    stem, _, suffix = name.rpartition(".")
    top = {theirs: ours for ours, theirs in TOP_NAMES.items()}
    if stem in top:
        return f"{top[stem]}.{suffix}"
    _, _, layer, leaf = stem.split(".", 3)
    return f"blk.{layer}.{ {theirs: ours for ours, theirs in LAYER_NAMES.items()}[leaf] }.{suffix}"


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleaves the halves that a rotation mixes, as llama.cpp stores queries and keys of Llama."""
    rows = weight.view(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    architecture: str = "llama",
    kinds: tuple[Any, ...] = (Q8,),
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    tokens: bool = True,
    **changes: Any,
) -> torch.nn.Module:
    """Writes a random model, its matrices in `kinds` by turns, and gives the stock model that it was made from."""
    model = stock_model(architecture, **{**GGUF_BASE, **changes})
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None)
    if head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
    if tokens:
        add_tokenizer(writer, config.vocab_size)
    for key, value in (extra or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    names = [name for name in model.state_dict() if not (config.tie_word_embeddings and name == "lm_head.weight")]
    for index, name in enumerate(names):
        weight = model.state_dict()[name]
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = permute(weight, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        add_tensor(writer, gguf_name(name), weight.numpy(), kinds[index % len(kinds)] if weight.dim() == 2 else None)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Any) -> None:
    if kind is None:
        writer.add_tensor(name, np.ascontiguousarray(values))
    else:
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """A byte-level vocabulary of single characters, with three special tokens and a chat template."""
    tokens = ["<pad>", "<s>", "</s>", "ab"] + [chr(33 + index) for index in range(size - 4)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (size - 3))
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
