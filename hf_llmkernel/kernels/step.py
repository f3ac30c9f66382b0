"""New tokens of every sequence through a causal model in one native call: `decode`, which `forward` asks first.

A `Plan` is what the native call needs to know of a model, made once and kept while the model stays as it is. Whatever a
plan does not cover (another module in the tree, hooks, gradients, another cache) is torch's.

Shapes: B batch, T new tokens, S tokens seen and the new ones, K tokens that logits are asked of, V vocab_size.
"""

import ctypes
import operator
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary
from weakref import ref as weakref

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, StaticLayer

from . import library
from .adapters import Unplanned, adapter_layouts, adapter_settings, is_adapted
from .cache import CACHES, roomy, start, static_place
from .layout import Layout, dense_layout, linear_of, stored_weight
from .library import ACTIVATIONS, NATIVE, TYPES, Layer, Linear, Model, Stored, check
from .paths import PATHS

MOST_SEQUENCES = 16  # of a decoding step, whose way of sharing out is for few rows
FEW_TOKENS = 8  # of a sequence, which take the path of one: their logits are the same to the bit
CHECKED_EVERY = 32  # tokens
PLACE = 10  # numbers of an `llmk_cache`
CHANGING_ROTATIONS = ("dynamic", "longrope")  # their frequencies follow the length
VERSION = operator.attrgetter("_version")
CAPTURING = "transformers.utils.output_capturing"
PLAIN_OPTIONS = ("use_cache", "return_dict", "logits_to_keep")


@dataclass
class Plan:
    """The C structures of a model and all that they point to; `model` is `None` where steps do not cover it."""

    watched: "Watched"
    model: Model | None = None
    kept: list[Any] = field(default_factory=list)
    layers: Any = None  # of `model`
    attending: list[int] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    vocabulary: int = 0
    matrices: list[tuple[int, int]] = field(default_factory=list)  # kind and number of weights of each
    native: dict[Any, bool] = field(default_factory=dict)  # whether it is the faster path, by rows and threads
    embeds: bool = False  # whether the native call looks tokens up itself
    hooked: bool = False
    cache: weakref[Cache] | None = None  # of the last step
    expected: int = 0  # tokens in it before the next step of the same sequences
    unchecked: int = 0

    def continues(self, cache: Cache, seen: int) -> bool:
        """Whether a step may do without comparing the model with what was watched.

        That looks at some thousand objects which the step before has pushed out of the processor's caches. Within one
        generation it is done for every 32nd token: an edit of the weights between two of its tokens may be seen late.
        """
        same = self.cache is not None and self.cache() is cache and seen == self.expected
        self.unchecked = self.unchecked + 1 if same else CHECKED_EVERY
        return self.unchecked < CHECKED_EVERY

    def is_faster(self, batch: int, new: int) -> bool:
        """Whether so many rows take less time here than through torch."""
        rows = 1 if batch == 1 and new <= FEW_TOKENS else batch * new
        key = rows, library.isa(), library.threads(), library.rounds_inputs()
        if key not in self.native:
            self.native[key] = PATHS.takes_step(self.matrices, len(self.layers), rows)
        return self.native[key]

    def stepped(self, cache: Cache, seen: int) -> None:
        self.expected = seen
        if self.cache is None or self.cache() is not cache:
            self.cache = weakref(cache)


class Watched:
    """What a plan was made from: modules, hooks and tensors, to see whether any of it is another now."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        inner = modules[1:]  # the model's own hooks run around its forward, which asks for the step
        self.attributes = [vars(module) for module in inner]
        self.hooks = [hooks for module in inner for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        named = [entries for module in modules for entries in (module._modules, module._parameters, module._buffers)]
        filled = [(entries, name, value) for entries in named for name, value in entries.items()]
        self.entries, self.names, self.values = (list(column) for column in zip(*filled, strict=True))
        self.tensors = [value for value in self.values if isinstance(value, torch.Tensor)]
        self.has_versions = not any(tensor.is_inference() for tensor in self.tensors)
        self.states = self._states() if self.has_versions else None
        self.adapted = [module for module in modules if is_adapted(module)]
        self.adapters = list(map(adapter_settings, self.adapted))

    def _states(self) -> tuple[list[int], list[int]]:
        # In C loops: a token waits for this.
        return list(map(torch.Tensor.data_ptr, self.tensors)), list(map(VERSION, self.tensors))

    def is_hooked(self) -> bool:
        """Whether anything else than the modules' own code would run."""
        if any("forward" in attributes for attributes in self.attributes):
            return True
        # A model that has given hidden states once keeps transformers' hooks, which do nothing without being asked.
        return any(hook.__module__ != CAPTURING for hooks in self.hooks if hooks for hook in hooks.values())

    def takes_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors)

    def is_same(self) -> bool:
        if not all(map(operator.is_, map(dict.get, self.entries, self.names), self.values)):
            return False
        if self.adapters != list(map(adapter_settings, self.adapted)):
            return False
        return not self.has_versions or self.states == self._states()


_plans: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def decode(
    model: nn.Module,
    input_ids: torch.Tensor | None,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    past_key_values: Any,
    options: dict[str, Any],
) -> torch.Tensor | None:
    """Logits `[B, K, V]` of new tokens, the cache extended by all of them; `None` where torch has to serve.

    Args:
        model: `LLMKernelForCausalLM`.
        input_ids: `[B, T]`.
        attention_mask: `None`, `[B, S]`, of one new token `[B, 1, 1, S]`, or one of these under the kind of attention.
        position_ids: `None` or `[B, T]`.
        options: all else that `forward` was given; any that asks for more than logits is torch's.
    """
    logits = None
    if _is_step(model, input_ids, past_key_values, options) and library.is_usable():
        kept = options.get("logits_to_keep") or None
        logits = _step(model, input_ids, attention_mask, position_ids, past_key_values, kept)
    library.leave_to_torch(native=logits is not None)
    return logits


def _step(
    model: Any,
    input_ids: Any,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    past_key_values: Any,
    kept: int | None,
) -> torch.Tensor | None:
    seen = int(past_key_values.get_seq_length(_first_attending(model)))
    plan = plan_of(model, past_key_values, seen)
    if plan.model is None or plan.hooked or plan.watched.takes_gradients():
        return None
    batch, new = input_ids.shape
    if not plan.is_faster(batch, new):
        return None
    mask = _seen_tokens(attention_mask, batch, seen, new)
    positions = _positions(position_ids, batch, seen, new)
    if mask is NotImplemented or positions is None:
        return None
    places = _cache_places(past_key_values, plan, batch, seen, new)
    if places is None:
        return None
    structure, tokens, table = plan.model, input_ids.to(torch.int64).contiguous(), None
    if not plan.embeds:
        structure, tokens, table = _looked_up(structure, model, tokens)
    logits = torch.empty(batch, min(kept or new, new), plan.vocabulary, dtype=plan.dtype)
    _call(structure, tokens, positions, places, mask, logits, first=not seen)
    for index in plan.attending:
        layer = past_key_values.layers[index]
        layer.cumulative_length.add_(new) if type(layer) is StaticLayer else layer.extend(new)
    plan.stepped(past_key_values, seen + new)
    return logits


def _is_step(model: Any, input_ids: Any, cache: Any, options: dict[str, Any]) -> bool:
    if model.training or type(input_ids) is not torch.Tensor or torch.is_autocast_enabled("cpu"):
        return False
    if input_ids.dim() != 2 or not input_ids.numel():
        return False
    if input_ids.device.type != "cpu" or torch._C._get_tracing_state() is not None:
        return False
    if type(cache) not in CACHES or cache.offloading:
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    if isinstance(options.get("logits_to_keep"), torch.Tensor):
        return False
    config, use_cache = model.config, options.get("use_cache")
    if config.output_attentions or config.output_hidden_states:
        return False
    if not (config.use_cache if use_cache is None else use_cache):
        return False
    others = (value for name, value in options.items() if name not in PLAIN_OPTIONS)
    return all(value is None or value is False for value in others)


def crop(model: nn.Module, cache: Cache, tokens: int) -> None:
    """Removes the last tokens from the cache of a generation that goes on."""
    cache.crop(-tokens)
    plan = _plans.get(model)
    if plan is not None and plan.cache is not None and plan.cache() is cache:
        plan.expected -= tokens


# ---- the cache and the call ----


def _cache_places(cache: Any, plan: Plan, batch: int, seen: int, new: int) -> array | None:
    """`llmk_cache` of every layer, those of a dynamic cache given room; `None` where one is not writable."""
    assert plan.model is not None
    layers, kind = cache.layers, TYPES[plan.dtype]
    if len(layers) < plan.model.layers:
        return None
    places = [0] * (PLACE * plan.model.layers)
    for index in plan.attending:
        shape = batch, plan.layers[index].key_value_heads, plan.model.head_dim
        if not layers[index].is_initialized:
            start(layers[index], *shape, plan.dtype)
        layer = layers[index]
        if type(layer) is StaticLayer:
            place = static_place(layer, new, shape)
        elif (writable := roomy(layer)) is not None:
            place = writable.place(new, shape)
            layers[index] = writable
        else:
            return None
        if place is None or place[7] != kind:
            return None
        places[PLACE * index : PLACE * (index + 1)] = place
        places[PLACE * index + 6] = seen - place[5]  # a window has let the first tokens go
    return array("q", places)


def _first_attending(model: Any) -> int:
    plan = _plans.get(model)
    return plan.attending[0] if plan is not None and plan.attending else model.model._first_cached() or 0


def _seen_tokens(attention_mask: Any, batch: int, seen: int, new: int) -> Any:
    """Bytes `[B, S]`, 0 where a token is not seen, `None` where all are; `NotImplemented` for masks of other shapes."""
    if isinstance(attention_mask, dict):
        if len(attention_mask) != 1 and any(mask is not None for mask in attention_mask.values()):
            return NotImplemented
        attention_mask = next(iter(attention_mask.values()), None)
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.device.type != "cpu":
        return NotImplemented
    length = seen + new
    if attention_mask.dim() == 4:
        if new > 1 or attention_mask.shape[1:3] != (1, 1):
            return NotImplemented
        attention_mask = attention_mask[:, 0, 0]
    if attention_mask.dim() != 2 or attention_mask.shape[0] not in (1, batch) or attention_mask.shape[1] < length:
        return NotImplemented
    shown = attention_mask == 0 if attention_mask.is_floating_point() else attention_mask != 0
    shown = shown[:, :length]
    return None if bool(shown.all()) else shown.to(torch.uint8).expand(batch, -1).contiguous()


def _positions(position_ids: torch.Tensor | None, batch: int, seen: int, new: int) -> torch.Tensor | None:
    if position_ids is None:
        return torch.arange(seen, seen + new).expand(batch, -1).contiguous()
    if position_ids.dim() != 2 or position_ids.shape[1] != new or position_ids.shape[0] not in (1, batch):
        return None
    return position_ids.expand(batch, -1).to(torch.int64).contiguous()


def _looked_up(structure: Model, model: Any, tokens: torch.Tensor) -> tuple[Model, torch.Tensor, torch.Tensor]:
    """The model over a table of just the rows that torch has looked up, the tokens' numbers in it, and the table."""
    table = model.model.embed_tokens(tokens).flatten(0, 1).float().contiguous()
    structure = Model.from_buffer_copy(structure)
    structure.embedding = _table(table)
    return structure, torch.arange(tokens.numel()).view(tokens.shape), table


def _call(
    structure: Model, tokens: Any, positions: Any, places: array, mask: Any, logits: torch.Tensor, first: bool
) -> None:
    assert NATIVE is not None
    batch, new = tokens.shape
    rounds_inputs = library.rounds_inputs()
    if rounds_inputs != bool(structure.rounds_inputs):  # a copy: another thread may be computing otherwise
        structure = Model.from_buffer_copy(structure)
        structure.rounds_inputs = rounds_inputs
    rows = (ctypes.byref(structure), tokens.data_ptr(), positions.data_ptr(), batch)
    seen = (places.buffer_info()[0], None if mask is None else mask.data_ptr(), 0 if mask is None else mask.shape[1])
    result = (logits.data_ptr(), TYPES[logits.dtype], library.threads())
    if new == 1 and batch <= MOST_SEQUENCES and rounds_inputs and not first:
        check(NATIVE.llmk_decode(*rows, *seen, *result))
    else:
        check(NATIVE.llmk_read(*rows, new, *seen, logits.shape[1], *result))


# ---- the plan ----


def plan_of(model: nn.Module, cache: Cache, seen: int) -> Plan:
    """The plan of a model as it now is, made anew where anything in it is another than before."""
    plan = _plans.get(model)
    if plan is not None and plan.continues(cache, seen):
        return plan
    if plan is None or not plan.watched.is_same():
        plan = _plans[model] = _make_plan(model)
    plan.hooked, plan.unchecked = plan.watched.is_hooked(), 0
    return plan


def _make_plan(model: Any) -> Plan:
    plan = Plan(Watched(model))
    try:
        if not plan.watched.has_versions:
            raise Unplanned("tensors made in inference mode, whose edits nothing tells of")
        plan.model = _model_structure(model, plan)
    except Unplanned:
        plan.kept.clear()
    return plan


def _model_structure(model: Any, plan: Plan) -> Model:
    body, config = _expect(model.model, "LLMKernelModel"), model.config
    _expect(body.rotary_emb, "LLMKernelRotaryEmbedding")
    if config.hidden_act not in ACTIVATIONS or body.rotary_emb.rope_type in CHANGING_ROTATIONS:
        raise Unplanned("the activation, or rotary frequencies that change")
    plan.dtype = body.norm.weight.dtype
    if plan.dtype not in (torch.float32, torch.bfloat16):
        raise Unplanned("a dtype that is neither float32 nor bfloat16")
    layers = list(body.layers[: config.num_hidden_layers])
    plan.vocabulary = model.lm_head.out_features
    plan.attending = [index for index, layer in enumerate(layers) if layer.attends]
    plan.layers = (Layer * len(layers))(*(_layer_structure(layer, config, plan) for layer in layers))
    table = _embedding(body.embed_tokens, plan)
    plan.embeds = table is not None
    return Model(
        layers=len(layers),
        hidden=config.hidden_size,
        head_dim=config.head_dim,
        activation=ACTIVATIONS[config.hidden_act],
        rounds_inputs=1,
        epsilon=config.rms_norm_eps,
        rotary_scale=body.rotary_emb.attention_scaling,
        rotary_frequencies=_floats(body.rotary_emb.inv_freq, plan),
        final_norm=_norm(body.norm, plan),
        layer=ctypes.addressof(plan.layers),
        head=_linear(model.lm_head, plan),
        embedding=table or Stored(),
    )


def _layer_structure(layer: Any, config: Any, plan: Plan) -> Layer:
    _expect(layer, "LLMKernelDecoderLayer")
    structure = Layer(attends=layer.attends, feeds=layer.feeds, gated=config.mlp_gated)
    if layer.attends:
        attention = _expect(layer.self_attn, "LLMKernelAttention")
        if attention.training and attention.attention_dropout:
            raise Unplanned("dropout")
        structure.query, structure.key, structure.value, structure.output = (
            _linear(linear, plan) for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        structure.heads = attention.q_proj.out_features // config.head_dim
        structure.key_value_heads = structure.heads // attention.num_key_value_groups
        structure.window = attention.sliding_window or 0
        structure.input_norm = _norm(layer.input_layernorm, plan)
        structure.query_norm, structure.key_norm = (_norm(norm, plan) for norm in (attention.q_norm, attention.k_norm))
    if layer.feeds:
        if type(_expect(layer.mlp, "LLMKernelMLP").act_fn) is not type(ACT2FN[config.hidden_act]):
            raise Unplanned("another activation than the configuration's")
        structure.up, structure.down = _linear(layer.mlp.up_proj, plan), _linear(layer.mlp.down_proj, plan)
        structure.gate = _linear(layer.mlp.gate_proj, plan) if layer.mlp.gated else Linear()
        structure.post_norm = _norm(layer.post_attention_layernorm, plan)
    return structure


def _expect(module: Any, name: str) -> Any:
    """The module, where it is of the family's class of this name."""
    if type(module).__name__ != name:
        raise Unplanned(f"{type(module).__name__} in place of {name}")
    return module


def _norm(norm: Any, plan: Plan) -> int | None:
    kind = type(norm)
    return None if kind is nn.Identity else _floats(_expect(norm, "LLMKernelRMSNorm").weight, plan)


def _floats(tensor: Any, plan: Plan) -> int:
    """Address of an fp32 copy that lives as long as the plan."""
    if tensor.device.type != "cpu" or type(tensor.data) is not torch.Tensor:
        raise Unplanned("a tensor elsewhere than on the CPU")
    plan.kept.append(tensor.detach().to(torch.float32, copy=True).contiguous())
    return plan.kept[-1].data_ptr()


def _linear(module: Any, plan: Plan) -> Linear:
    adapter = None
    if is_adapted(module):
        adapter, module = adapter_layouts(module), module.base_layer
    layouts = [_layout(factor) for factor in _factors(module)]
    plan.matrices += [(kind, rows * columns) for kind, rows, columns, *_ in (layout.description for layout in layouts)]
    bias = None if module.bias is None else module.bias.detach().float().contiguous()
    plan.kept += [*layouts, bias, adapter]
    return linear_of(layouts[0], layouts[1] if len(layouts) == 2 else None, bias, adapter)


def _factors(module: Any) -> Iterator[Any]:
    yield from (module.a, module.b) if type(module).__name__ == "LowRankLinear" else (module,)


def _layout(module: Any) -> Layout:
    kind, layout = type(module), None
    if kind is nn.Linear and type(module.weight.data) is torch.Tensor and module.weight.device.type == "cpu":
        layout = dense_layout(module.weight)
    elif kind.__name__ == "PackedLinear":
        layout = module.kernel_layout()
    if layout is None:
        raise Unplanned(f"{kind.__name__}: no kernel layout")
    return layout


def _embedding(module: Any, plan: Plan) -> Stored | None:
    """The table as it is stored, where the native call can look tokens up in it."""
    kind = type(module)
    if kind is nn.Embedding and module.weight.dtype in (torch.float32, torch.bfloat16):
        plan.kept.append(module.weight.detach())
        return _table(module.weight) if module.weight.is_contiguous() and module.weight.device.type == "cpu" else None
    if kind.__name__ == "PackedEmbedding" and module.form.bits < 16 and module.form.sparsity is None:
        stored = module.stored()
        if all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in stored.values()):
            plan.kept.append(stored)
            return stored_weight(stored, module.form, module.out_features, module.in_features)
    return None


def _table(weight: torch.Tensor) -> Stored:
    rows, columns = weight.shape
    return Stored(
        rows=rows, columns=columns, bits=16, value_type=TYPES[weight.dtype], group=columns, values=weight.data_ptr()
    )
