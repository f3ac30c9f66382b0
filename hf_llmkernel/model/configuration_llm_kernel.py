# Copyright 2026 The hf_llmkernel authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of the LLMKernel family: the architecture, and in it every compressed form of every linear.

Reading order: `LinearForm` (what is stored for one linear) -> `LLMKernelConfig` (the whole architecture).
What was done to a checkpoint is in `config.json` alone, so that building the model from it gives exactly the shapes
that its files hold.
"""

import inspect
import math
import re
import reprlib
import shutil
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import auto_docstring, cached_file

FORM_VERSION = 1
SCALE_DTYPES = ("float16", "bfloat16", "float32")
ZERO_POINT_DTYPES = ("uint8", *SCALE_DTYPES)
INIT_SCHEMES = (
    "normal",
    "truncated_normal",
    "uniform",
    "xavier_uniform",
    "xavier_normal",
    "kaiming_uniform",
    "kaiming_normal",
    "orthogonal",
    "depth_scaled",
)
ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
SUBLAYERS = ("attention", "mlp")
# Of a `quantization_config` that asks for 4 bits of bitsandbytes.
BITSANDBYTES_SETTINGS = {
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_compute_dtype": ("float32", "bfloat16", "float16"),
}
# What a layer can have of its own; all else is one for the whole model.
LAYER_FIELDS = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
    "linear_forms",
    "skip",
)

# Everything a folder needs to load where this package is not installed.
PAYLOAD_FILES = (
    "checks_llm_kernel.py",
    "configuration_llm_kernel.py",
    "cuda_llm_kernel.py",
    "linear_llm_kernel.py",
    "modeling_llm_kernel.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_llm_kernel.LLMKernelConfig",
    "AutoModel": "modeling_llm_kernel.LLMKernelModel",
    "AutoModelForCausalLM": "modeling_llm_kernel.LLMKernelForCausalLM",
    "AutoModelForSequenceClassification": "modeling_llm_kernel.LLMKernelForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_llm_kernel.LLMKernelForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_llm_kernel.LLMKernelForQuestionAnswering",
}


@dataclass(frozen=True)
class LinearForm:
    """How one linear of weight `[out_features, in_features]` is stored.

    A linear is dense, or low-rank (`y = b(a(x))`, two linears with a form each); each of these is full or sparse, and
    each of those floating or integer. Every stored shape follows from the form and the linear's two dimensions.

    Args:
        bias (`bool`, *optional*): whether a bias is stored; `None` keeps the configuration's own default.
        rank (`int`, *optional*): rank r of the factorization `W = B A`, A `[r, in]`, B `[out, r]`.
        a, b (`LinearForm`, *optional*): forms of the two factors; `None` is dense. Only with `rank`.
        sparsity (`str`, *optional*): `"bitmask"` (any positions) or `"N:M"` (N kept in every M columns, as in `"2:4"`).
        nnz (`int`, *optional*): number of values a bitmask keeps. Only, and always, with `"bitmask"`.
        bits (`int`): 16 for floating values in the model's dtype, 8 or 4 for integers with scales.
        group_size (`int`, *optional*): dense columns that share one scale; `None` is one scale a row.
        symmetric (`bool`): integers around zero; otherwise zero points are stored too.
        zero_point_dtype, scale_dtype (`str`): dtypes in which they are stored, whatever the model's dtype.
        version (`int`): version of the storage layout.

    Raises:
        ValueError: a field outside its range, or a combination that has no meaning.
    """

    bias: bool | None = None
    rank: int | None = None
    a: "LinearForm | None" = None
    b: "LinearForm | None" = None
    sparsity: str | None = None
    nnz: int | None = None
    bits: int = 16
    group_size: int | None = None
    symmetric: bool = True
    zero_point_dtype: str = "uint8"
    scale_dtype: str = "float16"
    version: int = FORM_VERSION

    def __post_init__(self):
        for name, value, legal in (
            ("version", self.version, (FORM_VERSION,)),
            ("bits", self.bits, (16, 8, 4)),
            ("scale_dtype", self.scale_dtype, SCALE_DTYPES),
            ("zero_point_dtype", self.zero_point_dtype, ZERO_POINT_DTYPES),
        ):
            if value not in legal or type(value) is not type(legal[0]):  # 8.0 is no 8
                raise ValueError(f"linear form: {name}={value!r} is not one of {list(legal)}; set one of these.")
        self._check_flags()
        self._check_numbers()
        if self.rank is not None:
            self._check_low_rank()
        elif self.a is not None or self.b is not None:
            raise ValueError("linear form: a and b are the factors of a low rank; set rank, or remove them.")

    def _check_flags(self) -> None:
        if self.bias not in (None, True, False):
            raise ValueError(f"linear form: bias={self.bias!r} must be true, false or null.")
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"linear form: symmetric={self.symmetric!r} must be true or false.")
        if self.bits == 16 and not (self.group_size is None and self.symmetric):
            raise ValueError("linear form: group_size and symmetric belong to integers; set bits to 8 or 4.")

    def _check_numbers(self) -> None:
        for name, minimum in (("rank", 1), ("group_size", 1), ("nnz", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
                raise ValueError(f"linear form: {name}={value!r} must be an integer of at least {minimum}.")
        if (self.sparsity == "bitmask") != (self.nnz is not None):
            raise ValueError(f"linear form: nnz={self.nnz!r} goes with sparsity 'bitmask', and only with it.")
        if self.sparsity not in (None, "bitmask"):
            self.kept_of_group()

    def _check_low_rank(self) -> None:
        if self.is_packed:
            raise ValueError("linear form: with rank, sparsity and bits belong to the factors; set them on a and b.")
        for name, factor in (("a", self.a), ("b", self.b)):
            if factor is not None and factor.rank is not None:
                raise ValueError(f"linear form: {name}.rank={factor.rank} factorizes a factor; remove it.")
            if factor is not None and factor.bias is not None:
                raise ValueError(f"linear form: {name}.bias belongs to the linear itself; set bias beside rank.")

    @classmethod
    def from_dict(cls, form: "dict[str, Any] | LinearForm | None") -> "LinearForm":
        """Reads a form from its JSON dictionary. Raises `ValueError` on an unknown key, naming the known ones."""
        if form is None or isinstance(form, cls):
            return form or cls()
        if not isinstance(form, dict):
            raise ValueError(f"linear form: {form!r} must be a dictionary.")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(form) - set(known)):
            raise ValueError(f"linear form: unknown keys {unknown}; the known ones are {known}.")
        nested = {name: cls.from_dict(form[name]) for name in ("a", "b") if form.get(name) is not None}
        return cls(**{**form, **nested})

    def to_dict(self) -> dict[str, Any]:
        """The JSON dictionary of this form; fields at their defaults are left out, `version` is always there."""
        default = LinearForm()
        form = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "version" or value != getattr(default, field.name):
                form[field.name] = value.to_dict() if isinstance(value, LinearForm) else value
        return form

    @property
    def is_packed(self) -> bool:
        """Whether values are stored packed: sparse, integer, or both."""
        return self.sparsity is not None or self.bits < 16

    @property
    def is_dense(self) -> bool:
        """Whether this is a plain floating linear."""
        return self.rank is None and not self.is_packed

    @property
    def is_trainable(self) -> bool:
        """Whether every value can take a gradient: integers cannot."""
        return all(factor.bits == 16 for factor in self.factors) if self.rank else self.bits == 16

    @property
    def factors(self) -> "tuple[LinearForm, LinearForm]":
        """Forms of the two factors of a low rank, the bias on the second."""
        return self.a or LinearForm(), replace(self.b or LinearForm(), bias=self.bias)

    def with_bias(self, default: bool) -> "LinearForm":
        """This form with its bias decided: its own if it says so, else `default`."""
        return replace(self, bias=default) if self.bias is None else self

    def kept_of_group(self) -> tuple[int, int]:
        """N and M of an N:M sparsity."""
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", str(self.sparsity))
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(
                f"linear form: sparsity={self.sparsity!r} must be 'bitmask' or 'N:M' with N < M, such as '2:4'."
            )
        return int(match[1]), int(match[2])

    def values_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the stored values of a packed form, before two 4-bit values share a byte."""
        if self.sparsity is None:
            return (out_features, in_features)
        if self.sparsity == "bitmask":
            return (self.nnz,)
        kept, group = self.kept_of_group()
        return (out_features, in_features // group * kept + min(kept, in_features % group))

    def stored_tensors(self, out_features: int, in_features: int) -> "dict[str, tuple[tuple[int, ...], str | None]]":
        """Names, shapes and dtypes of what a linear of this form stores; dtype `None` is the model's own.

        Raises:
            ValueError: a rank above either dimension, or more values than the linear has.
        """
        if self.rank is not None:
            return self._stored_factors(out_features, in_features)
        bias = {"bias": ((out_features,), None)} if self.bias else {}
        if self.is_dense:
            return {"weight": ((out_features, in_features), None), **bias}
        if self.nnz is not None and self.nnz > out_features * in_features:
            raise ValueError(
                f"linear form: nnz={self.nnz} is above the {out_features * in_features} values of a linear "
                f"[{out_features}, {in_features}]; store the count of the mask."
            )
        return {**self._stored_values(out_features, in_features), **bias}

    def _stored_factors(self, out_features: int, in_features: int) -> "dict[str, tuple[tuple[int, ...], str | None]]":
        if self.rank > min(out_features, in_features):
            raise ValueError(
                f"linear form: rank={self.rank} is above min({out_features}, {in_features}) of the linear; lower it."
            )
        a, b = self.factors
        first = a.stored_tensors(self.rank, in_features).items()
        second = b.stored_tensors(out_features, self.rank).items()
        return {**{f"a.{name}": entry for name, entry in first}, **{f"b.{name}": entry for name, entry in second}}

    def _stored_values(self, out_features: int, in_features: int) -> "dict[str, tuple[tuple[int, ...], str | None]]":
        shape = self.values_shape(out_features, in_features)
        if self.bits == 4:
            shape = (*shape[:-1], math.ceil(shape[-1] / 2))
        dtype = {16: None, 8: "int8" if self.symmetric else "uint8", 4: "uint8"}[self.bits]
        stored = {"values": (shape, dtype)}
        if self.sparsity is not None:
            stored["mask"] = ((out_features, math.ceil(in_features / 8)), "uint8")
        if self.bits < 16:
            groups = math.ceil(in_features / (self.group_size or in_features))
            stored["scales"] = ((out_features, groups), self.scale_dtype)
            if not self.symmetric:
                stored["zero_points"] = ((out_features, groups), self.zero_point_dtype)
        return stored


ConfigClass = TypeVar("ConfigClass", bound=type)


def with_plain_errors(config_class: ConfigClass) -> ConfigClass:
    """The class with the errors of `@strict`, which are of several lines and no `ValueError`, as one-line ones."""
    assign, validate = config_class.__setattr__, config_class.validate

    @wraps(assign)
    def assign_plainly(self, name, value):
        try:
            assign(self, name, value)
        except StrictDataclassFieldValidationError:
            refuse_type(config_class, name, value)

    @wraps(validate)
    def validate_plainly(self):
        try:
            validate(self)
        except StrictDataclassClassValidationError as error:
            raise ValueError(str(error.__cause__)) from None

    config_class.__setattr__, config_class.validate = assign_plainly, validate_plainly
    return config_class


def refuse_type(config_class: type, name: str, value: Any, where: str = "") -> None:
    """Raises `ValueError` for a field of another type than the class declares."""
    declared = next(field.type for field in fields(config_class) if field.name == name)
    kind = inspect.formatannotation(declared).replace(" | ", " or ").replace("None", "null")
    raise ValueError(f"{where}{name}={reprlib.repr(value)}: must be {kind}; correct it.") from None


def check_bitsandbytes(asked: dict[str, Any]) -> None:
    """Raises `ValueError` for a `quantization_config` of bitsandbytes with which no model loads, or none computes."""
    names = ("load_in_4bit", "load_in_8bit")
    if asked.get("quant_method", "bitsandbytes") != "bitsandbytes" and not any(map(asked.get, names)):
        return
    flags = {name: asked.get(name, False) for name in (*names, "bnb_4bit_use_double_quant")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"quantization_config: {name}={value!r} must be true or false.")
    if flags["load_in_4bit"] and flags["load_in_8bit"]:
        raise ValueError("quantization_config: load_in_4bit and load_in_8bit are both true; leave one of them out.")
    for name, legal in BITSANDBYTES_SETTINGS.items() if flags["load_in_4bit"] else ():
        value = asked.get(name)
        if value is not None and str(value).removeprefix("torch.") not in legal:
            raise ValueError(f"quantization_config: {name}={value!r} is not one of {list(legal)}.")
    if not isinstance(threshold := asked.get("llm_int8_threshold", 6.0), float):
        raise ValueError(f"quantization_config: llm_int8_threshold={threshold!r} must be a number such as 6.0.")
    skipped = asked.get("llm_int8_skip_modules")
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)):
        raise ValueError(f"quantization_config: llm_int8_skip_modules={skipped!r} must be a list of names, or null.")


@auto_docstring(custom_intro="Configuration of the LLMKernel family; its defaults are Llama's.")
@with_plain_errors
@strict
class LLMKernelConfig(PreTrainedConfig):
    r"""
    attention_out_bias (`bool`, *optional*):
        Whether `o_proj` has a bias; `None` follows `attention_bias`.
    qk_norm (`bool`, defaults to `False`):
        Whether queries and keys pass an RMSNorm over `head_dim` before the rotation.
    mlp_gated (`bool`, defaults to `True`):
        `down(act(gate(x)) * up(x))` if true, `down(act(up(x)))` if false.
    init_scheme (`str`, defaults to `"normal"`):
        Initialization of linears: normal, truncated_normal, uniform, xavier_uniform, xavier_normal, kaiming_uniform,
        kaiming_normal, orthogonal, or depth_scaled (normal, with what writes into the residual stream divided by
        sqrt(2 * layers), as in GPT-2).
    linear_forms (`dict[str, dict]`, *optional*):
        The stored form of a layer's linears by leaf name (`q_proj`, `down_proj`, ...), see [`LinearForm`]. A layer's
        own, in `per_layer_config`, replaces it whole.
    embed_tokens_form (`dict`, *optional*):
        The stored form of the token embedding `[vocab_size, hidden_size]`; a tied head shares it.
    lm_head_form (`dict`, *optional*):
        The stored form of an untied head.
    skip (`list[str]`, *optional*):
        Sublayers left out, of `"attention"` and `"mlp"`; meant for `per_layer_config`.

    ```python
    >>> from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM

    >>> config = LLMKernelConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LLMKernelForCausalLM(config)
    ```"""

    model_type = "llm_kernel"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    mlp_gated: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    attention_dropout: int | float = 0.0
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    init_scheme: str = "normal"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    linear_forms: dict[str, dict] | None = None
    embed_tokens_form: dict | None = None
    lm_head_form: dict | None = None
    skip: list[str] | None = None

    def __post_init__(self, **kwargs):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1; correct it.")
        self._check_overrides(kwargs.get("per_layer_config"))
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        self.linear_forms = self.linear_forms or {}
        self.skip = self.skip or []
        super().__post_init__(**kwargs)
        ends = (LinearForm.from_dict(form) for form in (self.embed_tokens_form, self.lm_head_form))
        if self.dtype is None and any(not form.is_trainable for form in ends):
            # Else the library takes the first floating tensor's of a checkpoint, which can be that of scales.
            self.dtype = torch.get_default_dtype()
        # Of the instance, for the plan of a low-rank linear differs from a dense one's.
        self.base_model_tp_plan = self._tensor_parallel_plan()

    def _check_overrides(self, per_layer_config: dict | None) -> None:
        per_layer_config = {} if per_layer_config is None else per_layer_config
        if not isinstance(per_layer_config, dict) or not all(str(index).isdigit() for index in per_layer_config):
            raise ValueError(
                f"per_layer_config={reprlib.repr(per_layer_config)}: must be a dictionary from numbers of layers, 0 to "
                f"{self.num_hidden_layers - 1}; correct it."
            )
        for layer_idx, overrides in per_layer_config.items():
            if not isinstance(overrides, dict):
                raise ValueError(
                    f"per_layer_config[{layer_idx}]={reprlib.repr(overrides)}: must be a dictionary; correct it."
                )
            if unknown := sorted(set(overrides) - set(LAYER_FIELDS)):
                raise ValueError(
                    f"per_layer_config[{layer_idx}]: {unknown[0]!r} is not a layer's own; those that are: "
                    f"{list(LAYER_FIELDS)}."
                )
            for name, value in overrides.items():
                self._check_type(name, value, f"per_layer_config[{layer_idx}]: ")
        if self.skip and per_layer_config:
            # transformers' view of a layer knows no default for `skip`, so it would silently count for nothing.
            raise ValueError(f"skip={self.skip!r}: is read in per_layer_config alone where there is one; set it there.")

    def _check_type(self, name: str, value: Any, where: str) -> None:
        for validator in self.__validators__[name]:  # of `@strict`
            try:
                validator(value)
            except (ValueError, TypeError):
                refuse_type(type(self), name, value, where)

    def validate_architecture(self):
        """Part of `@strict`: every layer's shapes and forms are legal. Raises `ValueError` naming layer and value."""
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"initializer_range={self.initializer_range}: must be a finite number, at least 0.")
        if self.init_scheme not in INIT_SCHEMES:
            raise ValueError(f"init_scheme={self.init_scheme!r} is not one of {list(INIT_SCHEMES)}.")
        if self.hidden_act not in ACT2CLS:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not an activation of transformers: {sorted(ACT2CLS)}.")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("sliding_window=None: layer_types has 'sliding_attention'; set the width of the window.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window}: must be at least 1, or null for none.")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id}: must be below vocab_size={self.vocab_size}; correct it."
            )
        asked = getattr(self, "quantization_config", None)
        if asked is not None:
            check_bitsandbytes(asked if isinstance(asked, dict) else asked.to_dict())
        for name in ("embed_tokens_form", "lm_head_form"):
            self._check_form(name, getattr(self, name), self.vocab_size, self.hidden_size)
        if self.tie_word_embeddings and self.lm_head_form is not None:
            raise ValueError("lm_head_form: a tied head takes embed_tokens_form; remove it or untie the embeddings.")
        layers = list(self.per_layer_config)
        if layers and all("attention" in (layer.skip or []) for layer in layers):
            raise ValueError(
                "skip: no layer attends, so positions have no cache; keep attention in at least one layer."
            )
        for layer_idx, layer in enumerate(layers):
            self._check_layer(f"layer {layer_idx}", layer)

    @staticmethod
    def _check_layer(where: str, layer: "LLMKernelConfig") -> None:
        heads, key_value_heads = layer.num_attention_heads, layer.num_key_value_heads
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
            if getattr(layer, name) < 1:
                raise ValueError(f"{where}: {name}={getattr(layer, name)} must be at least 1; see `skip` to leave out.")
        if heads % key_value_heads:
            raise ValueError(
                f"{where}: num_attention_heads={heads} must be a multiple of num_key_value_heads={key_value_heads}; "
                "change either."
            )
        if layer.head_dim % 2:
            raise ValueError(f"{where}: head_dim={layer.head_dim} must be even, for rotary positions turn pairs.")
        if unknown := sorted(set(layer.skip or []) - set(SUBLAYERS)):
            raise ValueError(f"{where}: skip={unknown} is unknown; the sublayers are {list(SUBLAYERS)}.")
        shapes = layer.linear_shapes()
        for name, form in (layer.linear_forms or {}).items():
            if name not in shapes:
                raise ValueError(f"{where}: linear_forms names {name!r}; its linears are {list(shapes)}.")
            layer._check_form(f"{where}, {name}", form, *shapes[name])

    @staticmethod
    def _check_form(where: str, form: "dict | None", out_features: int, in_features: int) -> None:
        try:
            LinearForm.from_dict(form).stored_tensors(out_features, in_features)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """`{leaf name: (out_features, in_features)}` of one layer's linears, skipped sublayers included."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        shapes = {
            "q_proj": (queries, self.hidden_size),
            "k_proj": (keys, self.hidden_size),
            "v_proj": (keys, self.hidden_size),
            "o_proj": (self.hidden_size, queries),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }
        return {name: shape for name, shape in shapes.items() if self.mlp_gated or name != "gate_proj"}

    def linear_form(self, name: str) -> LinearForm:
        """The form of one linear of a layer (`config.per_layer_config[i].linear_form("q_proj")`), its bias decided."""
        biases = dict.fromkeys(ATTENTION_LINEARS, self.attention_bias) | dict.fromkeys(MLP_LINEARS, self.mlp_bias)
        biases["o_proj"] = bool(self.attention_out_bias)
        return LinearForm.from_dict((self.linear_forms or {}).get(name)).with_bias(biases[name])

    @property
    def kv_sharing_modes(self) -> "list[str] | None":
        """Read by transformers' caches: a layer without attention gets a slot that never counts."""
        skips = ["attention" in (layer.skip or []) for layer in self.per_layer_config]
        return ["reuse" if skipped else "own" for skipped in skips] if any(skips) else None

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Plan of every linear by its form, over all layers at once: the library knows layer numbers only as `*`.

        Of a low-rank colwise linear only b is split, of a rowwise one only a; the other factor is replicated. Beside
        that stays the linear's own entry: for other layers' dense ones, and to tell caches that heads are split.
        """
        plan: dict[str, str] = {}
        for layer in self.per_layer_config:
            for name in layer.linear_shapes():
                sublayer, parent = ("attention", "self_attn") if name in ATTENTION_LINEARS else ("mlp", "mlp")
                if sublayer in (layer.skip or []):
                    continue
                style, factor = ("rowwise", "a") if name in ("o_proj", "down_proj") else ("colwise", "b")
                path = f"layers.*.{parent}.{name}"
                plan[path] = style
                if layer.linear_form(name).rank is not None:
                    plan[f"{path}.{factor}"] = style
        if self.qk_norm:  # replicated, but each rank sees only its own heads
            plan |= {f"layers.*.self_attn.{name}": "replicated_with_grad_allreduce" for name in ("q_norm", "k_norm")}
        return plan

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Saves the configuration with the full `auto_map`, and beside it the files that `trust_remote_code` loads."""
        self.auto_map = dict(AUTO_MAP)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name in PAYLOAD_FILES:
            self._save_payload(name, folder / name)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _save_payload(self, name: str, target: Path) -> None:
        source = Path(__file__).resolve().with_name(name)
        if not source.exists():
            # Loaded as remote code, a file has beside it only what it imports; a model has saved its own by now.
            if target.exists():
                return
            source = Path(cached_file(self.name_or_path, name, revision=getattr(self, "_commit_hash", None)))
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)


__all__ = ["LLMKernelConfig", "LinearForm"]
