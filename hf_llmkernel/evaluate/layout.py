"""The linears and embeddings that a configuration makes, and the form in which each is stored.

This is read from the configuration alone: no model is built.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..checkpoint.bitsandbytes import BitsAndBytes, Tensors
from ..model.configuration_llm_kernel import ATTENTION_LINEARS, LinearForm, LLMKernelConfig

FAMILY = LLMKernelConfig.model_type
LLAMA_SHAPED = ("llama", "mistral", "qwen2", "qwen3")
SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Slot:
    """A linear or embedding of weight `[out_features, in_features]` at `name`, stored as `form` says."""

    name: str
    form: LinearForm
    out_features: int
    in_features: int
    quantization: BitsAndBytes | None = None  # of its floating matrices

    @property
    def is_compressed(self) -> bool:
        """Whether anything of it is not stored as a dense floating matrix."""
        return not self.form.is_dense or self.quantizes("weight")

    def quantizes(self, suffix: str) -> bool:
        """Whether bitsandbytes quantizes one of its tensors."""
        matrix = suffix == "weight" or suffix.endswith(".weight")
        module = f"{self.name}.{suffix}".removesuffix(".weight")
        return matrix and self.quantization is not None and self.quantization.quantizes(module)

    def stored_tensors(self, dtype: torch.dtype | None = None) -> Tensors:
        """Names, shapes and dtypes of what it stores, as `LinearForm` has them, for a model of a dtype."""
        tensors: Tensors = {}
        for suffix, (shape, own) in self.form.stored_tensors(self.out_features, self.in_features).items():
            if self.quantization is not None and self.quantizes(suffix):
                parts = self.quantization.stored_tensors(shape[0], shape[1], dtype)
                tensors |= {suffix.removesuffix("weight") + name: part for name, part in parts.items()}
            else:
                tensors[suffix] = (shape, own)
        return tensors

    def form_name(self, dtype: str) -> str:
        """Its form in a few words, see `form_name`; `dtype` of what is floating."""
        if self.quantization is None:
            return form_name(self.form, dtype)
        suffixes = ["weight"] if self.form.rank is None else ["a.weight", "b.weight"]
        dense = f"dense {dtype}"
        names = [self.quantization.name if self.quantizes(suffix) else dense for suffix in suffixes]
        return names[0] if self.form.rank is None else f"rank {self.form.rank} ({', '.join(names)})"


def shape_config(config: dict[str, Any]) -> LLMKernelConfig | None:
    """A configuration of this family that makes the shapes of `config`; `None` for a family that is not Llama-shaped.

    Raises:
        ValueError: `config` contradicts itself.
    """
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    try:
        if kind == FAMILY:
            return LLMKernelConfig.from_dict(config)
        if kind not in LLAMA_SHAPED:
            return None
        stock = CONFIG_MAPPING[kind].from_dict(config)
        shapes: dict[str, Any] = {name: getattr(stock, name, None) for name in (*SHAPE_FIELDS, "quantization_config")}
        return LLMKernelConfig(**shapes)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json: is no configuration of model_type {kind!r} ({reason}); correct it.") from error


def slots(config: LLMKernelConfig, prefix: str, has_head: bool) -> Iterator[Slot]:
    """All linears and embeddings, in the order of the computation.

    Args:
        config: of `shape_config`.
        prefix: of the body's tensor names: `model.`, or nothing where a body was saved alone.
        has_head: whether there is a language-model head; a tied one stores nothing of its own.
    """
    vocabulary, quantization = (config.vocab_size, config.hidden_size), BitsAndBytes.of(config)
    yield Slot(f"{prefix}embed_tokens", LinearForm.from_dict(config.embed_tokens_form), *vocabulary)
    for index, layer in enumerate(config.per_layer_config):
        for name, shape in layer.linear_shapes().items():
            parent, sublayer = ("self_attn", "attention") if name in ATTENTION_LINEARS else ("mlp", "mlp")
            if sublayer not in (layer.skip or []):
                path = f"{prefix}layers.{index}.{parent}.{name}"
                yield Slot(path, layer.linear_form(name), *shape, quantization=quantization)
    if has_head and not config.tie_word_embeddings:
        yield Slot("lm_head", LinearForm.from_dict(config.lm_head_form), *vocabulary, quantization=quantization)


def norm_shapes(config: LLMKernelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the norms' weights."""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}norm.weight": (config.hidden_size,)}
    for index, layer in enumerate(config.per_layer_config):
        path = f"{prefix}layers.{index}"
        if "attention" not in (layer.skip or []):
            shapes[f"{path}.input_layernorm.weight"] = (config.hidden_size,)
            if config.qk_norm:
                shapes[f"{path}.self_attn.q_norm.weight"] = (layer.head_dim,)
                shapes[f"{path}.self_attn.k_norm.weight"] = (layer.head_dim,)
        if "mlp" not in (layer.skip or []):
            shapes[f"{path}.post_attention_layernorm.weight"] = (config.hidden_size,)
    return shapes


def stored_values(form: LinearForm, out_features: int, in_features: int) -> int:
    """Number of weight values that a form stores, bias apart; two 4-bit values in a byte are two."""
    if form.rank is None:
        values = form.values_shape(out_features, in_features) if form.is_packed else (out_features, in_features)
        return math.prod(values)
    a, b = form.factors
    return stored_values(a, form.rank, in_features) + stored_values(b, out_features, form.rank)


def positions(form: LinearForm, out_features: int, in_features: int) -> int:
    """Number of positions that these values are chosen from: of the weight, or of both factors of a low rank."""
    return out_features * in_features if form.rank is None else form.rank * (out_features + in_features)


def form_name(form: LinearForm, dtype: str) -> str:
    """A form in a few words: `dense bfloat16`, `bitmask int4 g32`, `rank 64 (dense float32, 2:4 float32)`."""
    if form.rank is not None:
        a, b = form.factors
        return f"rank {form.rank} ({form_name(a, dtype)}, {form_name(b, dtype)})"
    if form.is_dense:
        return f"dense {dtype}"
    words = [] if form.sparsity is None else [form.sparsity]
    if form.bits == 16:
        return " ".join([*words, dtype])
    group = "per row" if form.group_size is None else f"g{form.group_size}"
    return " ".join([*words, f"int{form.bits}", group] + ([] if form.symmetric else ["asymmetric"]))
