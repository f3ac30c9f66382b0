"""The stock configuration that a GGUF file's metadata describes, and what its layers have of their own.

llama.cpp writes Mistral as the architecture `llama`, and a Llama whose layers differ as `deci`. What a file says about
the model is used or refused, never passed over: a key of its architecture that is not listed here is an error.
"""

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .families import FAMILIES
from .gguf_file import GGUFFile

ARCHITECTURES = ("llama", "qwen2", "qwen3", "deci")
FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
}
REQUIRED = tuple(FIELDS)[:5]
BY_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")  # lists in `deci`
TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
# Read below, or without effect on what the model computes.
READ = {"attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base", "vocab_size"}
SCALING = {"rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear"}
WITHOUT_EFFECT = {"rope.scaling.finetuned", "pooling_type"}
NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.attn_factor": 1.0, "attention.causal": True}
# Of Llama 3.1 and later; a file keeps only the frequencies' factors, and the largest of them is `factor`.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_FACTORS = "rope_freqs.weight"


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The fields of a config.json for a GGUF file.

    Raises:
        ValueError: an architecture that is not supported, or a key that no supported family has.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture={architecture!r} is not supported; the known ones are "
            f"{list(ARCHITECTURES)} (llama includes Mistral)."
        )
    own = _own_keys(file)
    if architecture == "deci":
        own |= {key: max(values) for key, values in _by_layer(file).items()}
    _check_keys(file, architecture, own)
    fields: dict[str, Any] = {FIELDS[key]: value for key, value in own.items() if key in FIELDS}
    fields |= {name: file.metadata[key] for key, name in TOKENS.items() if key in file.metadata}
    fields["head_dim"] = _head_dim(file, fields, own)
    fields["vocab_size"] = file.shape("model.embed_tokens.weight")[0]
    fields["tie_word_embeddings"] = "lm_head.weight" not in file.packed
    family = "llama" if architecture == "deci" else architecture
    family = "mistral" if family == "llama" and fields.get("sliding_window") else family
    fields |= {"model_type": family, "architectures": [f"{FAMILIES[family].prefix}ForCausalLM"]}
    if architecture == "llama" and family == "llama":
        fields["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in file.packed
        fields["mlp_bias"] = "model.layers.0.mlp.down_proj.bias" in file.packed
    elif family not in ("llama", "mistral"):
        fields["use_sliding_window"] = fields.get("sliding_window") is not None
    fields["rope_parameters"] = _rope_parameters(file, fields, own)
    return fields


def gguf_layers(file: GGUFFile) -> list[dict[str, Any]]:
    """What each layer of a `deci` file has of its own: fields of this family's layers, biases among its `linear_forms`.

    Empty of any other architecture.

    Raises:
        ValueError: a linear attention, which this family has not.
    """
    if file.metadata.get("general.architecture") != "deci":
        return []
    layers = []
    for index, (width, heads, key_value_heads) in enumerate(zip(*_by_layer(file).values(), strict=True)):
        if heads and not key_value_heads:
            raise ValueError(f"{file.path}: layer {index} has a linear for its attention, which is not supported.")
        shapes = {"intermediate_size": width, "num_attention_heads": heads, "num_key_value_heads": key_value_heads}
        skip = [] if heads else ["attention"]
        skip += [] if width else ["mlp"]
        stem = f"model.layers.{index}."
        biased = [key.split(".")[-2] for key in file.packed if key.startswith(stem) and key.endswith("_proj.bias")]
        fields = {name: value for name, value in shapes.items() if value} | ({"skip": skip} if skip else {})
        layers.append({**fields, "linear_forms": {name: {"bias": True} for name in biased}})
    return layers


def _own_keys(file: GGUFFile) -> dict[str, Any]:
    prefix = f"{file.metadata.get('general.architecture')}."
    return {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}


def _by_layer(file: GGUFFile) -> dict[str, list[int]]:
    """Widths and heads of every layer. Raises `ValueError` where they are not as many as there are layers."""
    own = _own_keys(file)
    own.setdefault(BY_LAYER[2], own.get(BY_LAYER[1]))
    count, lists = own.get("block_count", 0), {}
    for key in BY_LAYER:
        values = own.get(key)
        lists[key] = values if isinstance(values, list) else [values] * count
        if len(lists[key]) != count or None in lists[key] or not count:
            raise ValueError(f"{file.path}: deci.{key} is not of all {count} layers; fetch it again.")
    return lists


def _check_keys(file: GGUFFile, architecture: str, own: dict[str, Any]) -> None:
    known = {*FIELDS, *READ, *SCALING, *WITHOUT_EFFECT}
    for key, value in own.items():
        if key not in known and NEUTRAL.get(key) != value:
            raise ValueError(f"{file.path}: {architecture}.{key}={value!r} is not supported; use another checkpoint.")
        if key in known and isinstance(value, list):
            raise ValueError(f"{file.path}: {architecture}.{key} differs by layer, which is not supported.")
    missing = [key for key in REQUIRED if key not in own]
    missing += ["token_embd.weight"] if "model.embed_tokens.weight" not in file.packed else []
    if missing:
        raise ValueError(f"{file.path}: has no {missing[0]}; fetch it again, or use another file.")


def _head_dim(file: GGUFFile, fields: dict[str, Any], own: dict[str, Any]) -> int:
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    sizes = {own[name] for name in names if name in own}
    if len(sizes) > 1:
        raise ValueError(f"{file.path}: keys, values and rotations of several sizes {sorted(sizes)} are not supported.")
    return sizes.pop() if sizes else fields["hidden_size"] // fields["num_attention_heads"]


def _rope_parameters(file: GGUFFile, fields: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    kind = own.get("rope.scaling.type", "linear" if "rope.scale_linear" in own else "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    if kind == "yarn":
        original = own.get("rope.scaling.original_context_length", fields["max_position_embeddings"])
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor} if factor != 1.0 else {}
    elif kind != "none":
        raise ValueError(f"{file.path}: rope scaling {kind!r} is not supported; the known ones are linear and yarn.")
    return _llama3_parameters(file, fields, rope) if ROPE_FACTORS in file.packed else rope


def _llama3_parameters(file: GGUFFile, fields: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """The parameters behind a file's factors on the wavelengths, proven by computing the factors from them."""
    factors = file.values(ROPE_FACTORS)
    rope = {**rope, **LLAMA3, "rope_type": "llama3", "factor": factors.max().item()}
    config = FAMILIES["llama"].config_class(**{**fields, "rope_parameters": rope})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponent = torch.arange(0, fields["head_dim"], 2, dtype=torch.float) / fields["head_dim"]
    expected = rope["rope_theta"] ** -exponent / frequencies
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
        raise ValueError(f"{file.path}: the factors in {ROPE_FACTORS} are not Llama 3's; use the original checkpoint.")
    return rope
