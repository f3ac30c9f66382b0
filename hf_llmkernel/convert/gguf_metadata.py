"""What a GGUF file says of a model of this family, by the architectures of llama.cpp, and what those cannot express.

`llama` has all layers alike and `deci` layers with heads and widths of their own; both may have biases anywhere, and
interleave the two halves of queries and keys that a rotation turns into each other. `qwen2` has biases of queries, keys
and values, and `qwen3` norms of queries and keys; neither interleaves.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and src/models of llama.cpp.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..model.configuration_llm_kernel import MLP_LINEARS, LLMKernelConfig

INTERLEAVED = ("llama", "deci")
LAYER_FIELDS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
# Of a yarn that llama.cpp computes as transformers does; any other value has no key here.
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None}


def architecture_of(config: LLMKernelConfig) -> str:
    """The architecture that expresses a configuration; `obstacles` says what even that cannot."""
    if config.qk_norm:
        return "qwen3"
    if not is_uniform(config):
        return "deci"
    biased = biased_linears(config)
    whole = config.num_attention_heads * (config.head_dim or 0) == config.hidden_size
    return "qwen2" if whole and biased == {"q_proj", "k_proj", "v_proj"} else "llama"


def is_uniform(config: LLMKernelConfig) -> bool:
    """Whether all layers have the same shapes, and none leaves anything out."""
    shapes = {tuple(getattr(layer, name) for name in LAYER_FIELDS) for layer in config.per_layer_config}
    return len(shapes) == 1 and not any(layer.skip for layer in config.per_layer_config)


def biased_linears(config: LLMKernelConfig) -> set[str]:
    """Names of the linears that have a bias in any layer."""
    layers = list(config.per_layer_config)
    return {name for layer in layers for name in layer.linear_shapes() if layer.linear_form(name).bias}


def obstacles(config: LLMKernelConfig) -> Iterator[str]:
    """What of a configuration llama.cpp cannot run, forms apart: layer, and field."""
    if config.hidden_act != "silu":
        yield f"all layers: hidden_act={config.hidden_act!r}, and llama.cpp has silu there"
    if not config.mlp_gated:
        yield "all layers: mlp_gated=False, and llama.cpp has a gate there"
    if not getattr(config, "is_causal", True):
        yield "all layers: is_causal=False, and llama.cpp generates from a causal model"
    yield from _layer_obstacles(config)
    yield from _rope_obstacles(config)


def _layer_obstacles(config: LLMKernelConfig) -> Iterator[str]:
    for index, layer in enumerate(config.per_layer_config):
        skip = layer.skip or []
        if "mlp" in skip:
            yield f"layer {index}: skip={skip!r}, and llama.cpp runs no layer without a feed-forward"
        elif skip and index == 0:
            yield f"layer 0: skip={skip!r}, and llama.cpp takes the size of heads from a first layer that attends"
    sliding = [index for index, kind in enumerate(config.layer_types or []) if kind == "sliding_attention"]
    if sliding and (config.sliding_window or 0) < config.max_position_embeddings:
        yield f"layer {sliding[0]}: layer_types says 'sliding_attention', and llama.cpp attends to all there"
    if not config.qk_norm:
        return
    if not is_uniform(config):
        yield "all layers: qk_norm=True, which llama.cpp has with layers alike only"
    if biased := sorted(biased_linears(config) & {"o_proj", *MLP_LINEARS}):
        yield f"all layers: {biased[0]} has a bias, and llama.cpp has none there beside qk_norm"


def _rope(config: LLMKernelConfig) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **(config.rope_parameters or {})}


def _rope_obstacles(config: LLMKernelConfig) -> Iterator[str]:
    rope = _rope(config)
    kind = rope["rope_type"]
    if kind not in ("default", "linear", "yarn", "llama3"):
        yield f"all layers: rope type {kind!r}, and llama.cpp has default, linear, yarn and llama3"
    if kind == "yarn":
        for name, default in YARN_DEFAULTS.items():
            if rope.get(name) not in (None, default):
                yield f"all layers: {name}={rope[name]!r} of yarn, and llama.cpp has its default"


def metadata(config: LLMKernelConfig, architecture: str) -> dict[str, Any]:
    """The keys and values of an architecture, without its prefix; lists are of all layers."""
    layers = list(config.per_layer_config)
    heads = [0 if "attention" in (layer.skip or []) else layer.num_attention_heads for layer in layers]
    key_value_heads = [
        0 if not count else layer.num_key_value_heads for count, layer in zip(heads, layers, strict=True)
    ]
    alike = architecture != "deci"
    widths = [layer.intermediate_size for layer in layers]
    return {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": widths[0] if alike else widths,
        "attention.head_count": heads[0] if alike else heads,
        "attention.head_count_kv": key_value_heads[0] if alike else key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        **_rope_metadata(config),
    }


def _rope_metadata(config: LLMKernelConfig) -> dict[str, Any]:
    rope = _rope(config)
    values: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        values["rope.scaling.original_context_length"] = int(original)
    return values


def rope_factors(config: LLMKernelConfig) -> torch.Tensor | None:
    """What llama.cpp divides the frequencies of Llama 3's rotation by, fp32 `[head_dim / 2]`; `None` of other ones."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config.per_layer_config[0], torch.device("cpu"))
    size = config.head_dim or 0
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    return plain / scaled
