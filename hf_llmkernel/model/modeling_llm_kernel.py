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
"""The LLMKernel decoder family: norm -> position -> attention -> mlp -> block -> model -> heads.

Every linear comes from the one factory by its form, so one class serves dense, pruned, low-rank, sparse and integer
checkpoints alike; layers may differ in width, heads, forms, and in what they skip.

Shapes: B batch, T tokens, S cached and new tokens, H hidden_size, N heads, D head_dim.
"""

import logging as stdlib_logging
import math
import re
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .checks_llm_kernel import (
    CAST_FILTER,
    CAST_LOGGER,
    HUB_ARGUMENTS,
    cast_floating,
    check_quantized,
    check_stored_quantized,
    check_stored_types,
    guard_four_bit,
    keep_floating,
    packed_names,
    quantized_linears,
    refuse_adapters_within_adapters,
    refuse_fixed_integers,
    refuse_keys,
    refuse_other_quantization,
    refuse_own_integers,
    refuse_quantization_config,
    refuse_uneven_heads,
)
from .configuration_llm_kernel import ATTENTION_LINEARS, MLP_LINEARS, LinearForm, LLMKernelConfig
from .linear_llm_kernel import (
    LowRankEmbedding,
    LowRankLinear,
    PackedLinear,
    PackedWeight,
    build_embedding,
    build_linear,
    is_whole,
    kernels_in_use,
    largest_mask,
    pack_weight,
)

logger = logging.get_logger(__name__)


class LLMKernelRMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension, in fp32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        exact = hidden_states.to(torch.float32)
        variance = exact.pow(2).mean(-1, keepdim=True)
        normalized = exact * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * normalized.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class LLMKernelRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021, arXiv 2104.09864), every type transformers knows."""

    def __init__(self, config: LLMKernelConfig):
        super().__init__()
        # A layer's view: some types read head counts, which the whole configuration may not have as one number.
        self.config = config.per_layer_config[0]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        compute: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            compute = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = compute(self.config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: LLMKernelConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `[D / 2]` of plain rotary positions, and the factor 1 on attention."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)  # [B, T, D/2]
        angles = torch.cat((freqs, freqs), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    def _apply(self, fn, recurse=True):
        exact = {name: getattr(self, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            # Cast to half precision they would misplace far tokens, and a saved model would not be the loaded one.
            if (after := getattr(self, name)).dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Turns the two halves of the last dimension by a quarter: `(x1, x2)` to `(-x2, x1)`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries and keys `[B, N, T, D]` by their positions' angles `[B, T, D]`."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Every key or value head as often as queries share it: `[B, N_kv, S, D]` to `[B, N_kv * n_rep, S, D]`."""
    return hidden_states if n_rep == 1 else hidden_states.repeat_interleave(n_rep, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax(q kᵀ · scaling + mask) v`: output `[B, T, N, D]` and weights `[B, N, T, S]`."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def residual_linear(linear: nn.Module, num_hidden_layers: int) -> nn.Module:
    """Marks a linear that writes into the residual stream, which depth-scaled initialization makes smaller."""
    for module in linear.modules():  # the factors of a low rank too
        module.residual_depth = num_hidden_layers
    return linear


class LLMKernelAttention(nn.Module):
    """Grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023, arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: LLMKernelConfig, layer_idx: int):
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.config = config  # the whole one, so that `set_attn_implementation` reaches this module
        self.layer_idx = layer_idx
        self.layer_type = config.layer_types[layer_idx]
        self.head_dim = layer.head_dim
        self.num_key_value_groups = layer.num_attention_heads // layer.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None

        shapes = layer.linear_shapes()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            out_features, in_features = shapes[name]
            setattr(self, name, build_linear(in_features, out_features, layer.linear_form(name)))
        residual_linear(self.o_proj, config.num_hidden_layers)
        # CODEPATH: Qwen3 normalizes queries and keys; Llama, Mistral and Qwen2 do not.
        self.q_norm = LLMKernelRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        # CODEPATH: as q_norm.
        self.k_norm = LLMKernelRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]  # [B, T]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(head_shape)).transpose(1, 2)  # [B, N, T, D]
        key = self.k_norm(self.k_proj(hidden_states).view(head_shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


class LLMKernelMLP(nn.Module):
    """The feed-forward of a block, gated (Shazeer 2020, arXiv 2002.05202) or plain."""

    def __init__(self, config: LLMKernelConfig, layer_idx: int):
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.gated = config.mlp_gated
        shapes = layer.linear_shapes()
        for name in ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj"):
            out_features, in_features = shapes[name]
            setattr(self, name, build_linear(in_features, out_features, layer.linear_form(name)))
        residual_linear(self.down_proj, config.num_hidden_layers)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gated:
            return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class LLMKernelDecoderLayer(GradientCheckpointingLayer):
    """A pre-norm block; a skipped sublayer leaves neither its norm nor its weights behind."""

    def __init__(self, config: LLMKernelConfig, layer_idx: int):
        super().__init__()
        skip = config.per_layer_config[layer_idx].skip or []
        self.attends = "attention" not in skip
        self.feeds = "mlp" not in skip
        if self.attends:
            self.self_attn = LLMKernelAttention(config, layer_idx)
            self.input_layernorm = LLMKernelRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.feeds:
            self.mlp = LLMKernelMLP(config, layer_idx)
            self.post_attention_layernorm = LLMKernelRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        if self.attends:
            attended, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            hidden_states = hidden_states + attended
        if self.feeds:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


TRUNCATED_SPREAD = 0.8796  # standard deviation of a normal distribution cut at two of its own


def initialize_weight(weight: torch.Tensor, scheme: str, std: float) -> None:
    """Fills a weight `[O, I]` with the standard deviation `std`, by the distribution of a scheme.

    A truncated normal one is cut at two of them; an orthogonal weight is scaled to it.
    """
    if scheme == "truncated_normal":
        init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    elif scheme.endswith("uniform"):
        init.uniform_(weight, a=-(3**0.5) * std, b=3**0.5 * std)
    elif scheme == "orthogonal":
        init.orthogonal_(weight, gain=std * max(weight.shape) ** 0.5)
    else:
        init.normal_(weight, std=std)


def scheme_std(scheme: str, std: float, out_features: int, in_features: int) -> float:
    """The standard deviation that a scheme gives a dense weight `[O, I]`.

    Xavier (Glorot and Bengio 2010), Kaiming (He et al. 2015, arXiv 1502.01852) and orthogonal (Saxe et al. 2013, arXiv
    1312.6120) follow from the shape, all others are given `std`.
    """
    if scheme.startswith("xavier"):
        return (2 / (out_features + in_features)) ** 0.5
    if scheme.startswith("kaiming"):
        return (2 / in_features) ** 0.5
    return max(out_features, in_features) ** -0.5 if scheme == "orthogonal" else std


COMPRESSED = (PackedWeight, LowRankLinear, LowRankEmbedding)
# Tensors that only a form which is not dense stores.
OF_A_FORM = re.compile(
    rf"(^|.*\.)({'|'.join((*ATTENTION_LINEARS, *MLP_LINEARS, 'embed_tokens', 'lm_head'))})"
    r"(\.[ab]\.weight|(\.[ab])?\.(values|mask|scales|zero_points))"
)


@auto_docstring
class LLMKernelPreTrainedModel(PreTrainedModel):
    config: LLMKernelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLMKernelDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True

    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": LLMKernelDecoderLayer,
        "attentions": LLMKernelAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (LowRankLinear, LowRankEmbedding)):
            return  # its factors are initialized on their own
        if isinstance(module, PackedWeight):
            self._init_packed(module)
        elif isinstance(module, nn.Linear):
            initialize_weight(module.weight, *self._init_spread(module))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and hasattr(module, "factor_of"):
            initialize_weight(module.weight, *self._init_spread(module))
        else:
            super()._init_weights(module)

    def _init_spread(self, module: nn.Module) -> tuple[str, float]:
        """Scheme and standard deviation of a weight; of a factor, such that the product spreads as a dense weight."""
        scheme = getattr(module, "init_scheme", self.config.init_scheme)
        out_features, in_features, rank = getattr(module, "factor_of", None) or (
            module.out_features,
            module.in_features,
            None,
        )
        std = scheme_std(scheme, self.config.initializer_range, out_features, in_features)
        # CODEPATH: "depth_scaled" is for pretraining from scratch as GPT-2 did; converted checkpoints keep "normal".
        if scheme == "depth_scaled" and (depth := getattr(module, "residual_depth", None)) is not None:
            std = std / (2 * depth) ** 0.5
        if rank is not None:
            std = (std / ((TRUNCATED_SPREAD if scheme == "truncated_normal" else 1.0) * rank**0.5)) ** 0.5
        return scheme, std

    def _init_packed(self, module: PackedWeight) -> None:
        stored = {**module.stored(), **({} if module.bias is None else {"bias": module.bias})}
        if all(getattr(tensor, "_is_hf_initialized", False) for tensor in stored.values()):
            return
        if module.values.device.type == "meta":  # offloaded to disk, or a model that is all shapes
            return
        weight = torch.empty(module.out_features, module.in_features, device=module.values.device)
        initialize_weight(weight, *self._init_spread(module))
        mask = None if module.form.sparsity is None else largest_mask(weight, module.form)
        packed = pack_weight(weight if mask is None else weight * mask, module.form, mask)
        for name, tensor in stored.items():
            init.zeros_(tensor) if name == "bias" else init.copy_(tensor, packed[name])

    def mark_tied_weights_as_initialized(self, loading_info):
        # The library looks for parameters only; the scales of a tied packed embedding are buffers.
        for name in self.all_tied_weights_keys:
            self.get_parameter_or_buffer(name)._is_hf_initialized = True

    def get_parameter(self, target):
        # Likewise where a state dict holds both of a tied pair, scales included, and the library compares them.
        try:
            return super().get_parameter(target)
        except AttributeError:
            return self.get_buffer(target)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        # The library keeps what is stored and only warns.
        if (asked := kwargs.get("quantization_config")) is not None:
            stored = config
            if not isinstance(config, PreTrainedConfig):
                hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
                stored = LLMKernelConfig.from_pretrained(config or pretrained_model_name_or_path, **hub)
            refuse_other_quantization(getattr(stored, "quantization_config", None), asked)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    def get_submodule(self, target):
        try:
            return super().get_submodule(target)
        except AttributeError:
            refuse_adapters_within_adapters(self, target)
            raise

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # The library casts whatever it reads to what the model holds: floating values to codes, codes to weights.
        quantizer, bitsandbytes = load_config.hf_quantizer, bool(quantized_linears(model))
        if quantizer is not None and quantizer.quantization_config.quant_method == "bitsandbytes":
            stdlib_logging.getLogger(CAST_LOGGER).addFilter(CAST_FILTER)
            keep_floating(model, quantizer)
        if quantizer is None or (bitsandbytes and quantizer.pre_quantized):
            check_stored_types(model, state_dict, checkpoint_files or [])
        if bitsandbytes and quantizer.pre_quantized:
            check_stored_quantized(model, state_dict, checkpoint_files or [])
        loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)
        if bitsandbytes and quantizer.pre_quantized:
            cast_floating(model, load_config.dtype)
        return loaded

    def _adjust_missing_and_unexpected_keys(self, loading_info):
        super()._adjust_missing_and_unexpected_keys(loading_info)
        self._check_packed(loading_info)
        check_quantized(self)

    def _check_packed(self, loading_info) -> None:
        """A compressed checkpoint loads whole or not at all: never with random values in place of missing ones."""
        compressed = {name: module for name, module in self.named_modules() if isinstance(module, COMPRESSED)}
        missing, mismatched = set(loading_info.missing_keys), {key for key, *_ in loading_info.mismatched_keys}
        nothing_loaded = missing | mismatched >= set(self.state_dict()) - set(self.all_tied_weights_keys)
        formed = [key for key in loading_info.unexpected_keys if OF_A_FORM.fullmatch(key)]
        refuse_keys("of a form that config.json does not have", [] if compressed else formed)
        if not compressed or nothing_loaded:  # the latter is a fresh model from an empty state dict
            return
        prefixes = tuple(f"{name}." for name in compressed)
        body = "" if self.base_model is self else f"{self.base_model_prefix}."
        # A task head may be new, but not that of the very class which was saved.
        whole = "" if type(self).__name__ in (self.config.architectures or ()) else body
        layers = (f"{self.base_model_prefix}.layers.", "layers.")  # as the file of one class or another names them
        stray = [key for key in loading_info.unexpected_keys if key.startswith((*layers, *prefixes))]
        lost = [key for key in missing if key.startswith((whole, *prefixes))]
        # A dense tensor of another shape is the library's to refuse, or to make anew if `ignore_mismatched_sizes`.
        lost += [key for key in mismatched if key.startswith(prefixes)]
        # The library reports shapes that differ without their names; here they are named below.
        reported, loading_info.mismatched_keys = loading_info.mismatched_keys, set()
        refuse_keys("missing or of another shape", lost)
        refuse_keys("not of the config's form", stray)
        loading_info.mismatched_keys = reported
        for name, module in compressed.items():
            if isinstance(module, PackedWeight):
                module.check_stored(name)
        for name, tensor in self.state_dict().items():
            if is_whole(tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{name}: has values that are not finite; fetch or write the checkpoint again.")

    def save_pretrained(self, save_directory, *args, **kwargs):
        # The library cannot turn what it has read of quantized linears back into what it would write, not even once
        # they are floating again; nothing else of this family is read in another format.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)

    def dequantize(self, dtype=None):
        if getattr(self, "hf_quantizer", None) is not None and not quantized_linears(self):
            raise ValueError("dequantize: no linear of this model is quantized; leave the call out.")
        refuse_own_integers(self.config)
        # The library takes the configuration's, which is no dtype but its name once the model has been saved.
        return super().dequantize(self.dtype if dtype is None else dtype)

    def train(self, mode: bool = True):
        guard_four_bit(self)  # nothing evaluates that was not told to
        return super().train(mode)

    def get_compiled_call(self, compile_config):
        self._prepare_linears()
        return super().get_compiled_call(compile_config)

    def compile(self, *args, **kwargs):
        self._prepare_linears()
        return super().compile(*args, **kwargs)

    def _prepare_linears(self):
        # Weights that were unpacked within a graph would be unpacked for every token.
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module.prepare()

    def _expand_parallel_plan(self, plan):
        # A low-rank linear is split in its factors; its own entry is that of the dense linears of other layers.
        modules = dict(self.named_modules())
        expanded = super()._expand_parallel_plan(plan)
        return {name: style for name, style in expanded.items() if not isinstance(modules.get(name), LowRankLinear)}

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        splits = distributed_config is not None and (distributed_config.tp_size or 1) > 1
        if splits and (packed := packed_names(model.config)):
            raise ValueError(
                f"tensor parallelism: {packed[0]} is stored sparse or integer, a form without a plan; use "
                "device_map or data parallelism, or a dense or low-rank checkpoint."
            )
        if splits:
            refuse_uneven_heads(model.config, distributed_config.tp_size, distributed_config.tp_plan)
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        if (stage := getattr(model, "_pp_stage", None)) is not None:
            for name in ("communicate", "broadcast_from_last"):
                setattr(stage, name, in_floating_type(getattr(stage, name), model))
        return model

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        ends = {"embedding": self.get_input_embeddings(), "head": self.get_output_embeddings()}
        compressed = [name for name, module in ends.items() if isinstance(module, COMPRESSED)]
        if not compressed:
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        rows, multiple = self.config.vocab_size, pad_to_multiple_of or 1
        if math.ceil((new_num_tokens or rows) / multiple) * multiple == rows:
            return ends["embedding"]
        raise ValueError(
            f"resize_token_embeddings: the {compressed[0]} is stored compressed and its rows cannot grow or shrink; "
            "resize the dense checkpoint, then compress it."
        )


def in_floating_type(exchange: Callable, model: PreTrainedModel) -> Callable:
    """A pipeline stage's exchange in the model's type: the library's is that of a first tensor, maybe of integers."""
    return lambda *args, dtype, **kwargs: exchange(*args, dtype=model.dtype, **kwargs)


@auto_docstring
class LLMKernelModel(LLMKernelPreTrainedModel):
    def __init__(self, config: LLMKernelConfig):
        super().__init__(config)
        refuse_quantization_config(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        form = LinearForm.from_dict(config.embed_tokens_form)
        self.embed_tokens = build_embedding(config.vocab_size, config.hidden_size, form, self.padding_idx)
        self.layers = nn.ModuleList([LLMKernelDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LLMKernelRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LLMKernelRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in config.layer_types

        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if self.training and kwargs.get("num_items_in_batch") is not None:  # `Trainer` gives it
            refuse_fixed_integers(self)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # [B, T, H]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length(self._first_cached() or 0) if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        masks = self._attention_masks(inputs_embeds, attention_mask, past_key_values, position_ids)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for index, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks[self.config.layer_types[index]],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def _attention_masks(self, inputs_embeds, attention_mask, past_key_values, position_ids) -> dict:
        """The mask of each kind of attention in use; `generate` may have made them already."""
        if isinstance(attention_mask, dict):
            return attention_mask
        arguments = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        masks = {}
        # CODEPATH: Llama and Qwen attend fully, Mistral v0.1 slides in every layer, others mix the two.
        if "full_attention" in self.config.layer_types:
            first = self._first_cached("full_attention")
            masks["full_attention"] = create_causal_mask(**arguments, layer_idx=first)
        if self.has_sliding_layers:
            first = self._first_cached("sliding_attention")
            masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments, layer_idx=first)
        return masks

    def _first_cached(self, layer_type: str | None = None) -> int | None:
        """Index of the first layer, of one type or any, that caches here; a pipeline's other stages cache their own."""
        for index, (kind, layer) in enumerate(zip(self.config.layer_types, self.layers, strict=False)):
            if layer_type in (None, kind) and getattr(layer, "attends", False):
                return index
        return None


@auto_docstring
class LLMKernelForCausalLM(LLMKernelPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LLMKernelConfig):
        super().__init__(config)
        self.model = LLMKernelModel(config)
        self.vocab_size = config.vocab_size
        tied = config.tie_word_embeddings
        form = LinearForm.from_dict(config.embed_tokens_form if tied else config.lm_head_form)
        self.lm_head = build_linear(config.hidden_size, config.vocab_size, form)
        if tied:  # every tensor that the form stores, whatever it is
            names = form.stored_tensors(config.vocab_size, config.hidden_size)
            self._tied_weights_keys = {f"lm_head.{name}": f"model.embed_tokens.{name}" for name in names}

        self.post_init()

    def generate(self, *args, **kwargs):
        kernels = kernels_in_use()
        with nullcontext() if kernels is None else kernels.generating():
            return super().generate(*args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        try:  # where the package is installed
            from hf_llmkernel.generate.speculative import assisted_decoding
        except ImportError:
            return super()._assisted_decoding(*args, **kwargs)
        written = assisted_decoding(self, *args, **kwargs)
        return super()._assisted_decoding(*args, **kwargs) if written is None else written

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        kernels = kernels_in_use()
        if kernels is not None and inputs_embeds is None and labels is None:
            caches = self.config.use_cache if use_cache is None else use_cache
            if caches and past_key_values is None and not self.training:
                past_key_values = DynamicCache(config=self.config)
            options = {"use_cache": use_cache, "logits_to_keep": logits_to_keep, **kwargs}
            logits = kernels.decode(self, input_ids, attention_mask, position_ids, past_key_values, options)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# The generic heads build their body through AutoModel, which remote code is not registered with; hence `__init__`.


class LLMKernelForSequenceClassification(GenericForSequenceClassification, LLMKernelPreTrainedModel):
    def __init__(self, config: LLMKernelConfig):
        LLMKernelPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LLMKernelModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

        self.post_init()


class LLMKernelForTokenClassification(GenericForTokenClassification, LLMKernelPreTrainedModel):
    def __init__(self, config: LLMKernelConfig):
        LLMKernelPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LLMKernelModel(config)
        # As the generic head reads them: a classifier's own dropout, else a model-wide one, else 0.1.
        dropouts = [getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout")]
        self.dropout = nn.Dropout(next((rate for rate in dropouts if rate is not None), 0.1))
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=bias)

        self.post_init()


class LLMKernelForQuestionAnswering(GenericForQuestionAnswering, LLMKernelPreTrainedModel):
    def __init__(self, config: LLMKernelConfig):
        LLMKernelPreTrainedModel.__init__(self, config)
        self.model = LLMKernelModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

        self.post_init()


__all__ = [
    "LLMKernelForCausalLM",
    "LLMKernelForQuestionAnswering",
    "LLMKernelForSequenceClassification",
    "LLMKernelForTokenClassification",
    "LLMKernelModel",
    "LLMKernelPreTrainedModel",
]
