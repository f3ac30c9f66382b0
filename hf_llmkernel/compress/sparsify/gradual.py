"""Gradual magnitude pruning while a model trains (Zhu and Gupta 2017, arXiv 1710.01878), as a callback of Trainer.

Reading order: how sparse at which step -> which weights -> how many of each matrix -> the callback -> the trained zeros
as packed forms.

Shapes: O out_features, I in_features, P matrices.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ...model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ...model.linear_llm_kernel import largest_mask, pack_weight
from ...model.modeling_llm_kernel import LLMKernelPreTrainedModel
from ..block import matrix_names, module_path, set_form
from ..plan import merge_layers, own_layers
from .magnitude import magnitude_scores
from .mask import check_sparsity, keep_highest, kept_of_group, select_mask

logger = logging.get_logger(__name__)

SCOPES = ("local", "global")
# How much of the way to the target is gone when a share u of the steps is. "cubic" is the paper's: much at first, when
# a dense model has most to spare. "cos", "cube" and "exp" are Intel Neural Compressor's: "cube" goes the other way.
GROWTH: dict[str, Callable[[float], float]] = {
    "cubic": lambda u: 1 - (1 - u) ** 3,
    "linear": lambda u: u,
    "cos": lambda u: 1 - math.cos(u * math.pi / 2),
    "cube": lambda u: u**3,
}
DECAYS = (*GROWTH, "exp")
BUCKET_BITS = 16  # scores are counted by the first, then by the last 16 bits of their fp32 representation


def sparsity_at(progress: float, initial: float, target: float, decay: str) -> float:
    """The share of weights removed when a share `progress` of the pruning steps is gone (the paper's equation 1)."""
    if progress >= 1:
        return target
    if decay == "exp":  # the share kept falls by the same factor at every step
        return 1 - (1 - initial) * ((1 - target) / (1 - initial)) ** progress
    return initial + (target - initial) * GROWTH[decay](progress)


def prunable_linears(
    model: nn.Module, include: Iterable[str], exclude: Iterable[str], heads: bool
) -> dict[str, nn.Linear]:
    """The linears of a model whose dense weights are pruned, by name; of those that share a weight the first.

    Factors of low-rank linears are linears of their own. Packed, integer and quantized ones have no dense weight.

    Raises:
        ValueError: a pattern that matches no linear, no linear left, or a weight that is not whole on this device.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _has_dense_weight(module)
    }
    _check_patterns(linears, (*include, *exclude))
    outer = set() if heads else _outer_parameters(model)
    chosen: dict[int, str] = {}
    for name, module in linears.items():
        if id(module.weight) not in outer and _matches(name, include) and not _matches(name, exclude):
            _check_whole(name, module)
            chosen.setdefault(id(module.weight), name)
    if not chosen:
        raise ValueError(f"include={list(include)}, exclude={list(exclude)}: no linear is left to prune; widen them.")
    return {name: linears[name] for name in chosen.values()}


def _has_dense_weight(module: nn.Linear) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.is_floating_point()


def _outer_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters of embeddings, of the output embedding, and of all outside of the model's body."""
    body = {id(parameter) for parameter in getattr(model, "base_model", model).parameters()}
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if (head := getattr(model, "get_output_embeddings", lambda: None)()) is not None:
        ends.append(head)
    outside = {id(parameter) for parameter in model.parameters()} - body
    return outside | {id(parameter) for module in ends for parameter in module.parameters()}


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern fits the path of a module or of one it lies in, or the end of either."""
    parts = path.split(".")
    known = {".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
    return any(fnmatchcase(name, pattern) for name in known for pattern in patterns)


def _check_patterns(linears: Iterable[str], patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, (pattern,)) for name in linears):
            known = sorted({re.sub(r"\b\d+\b", "*", name) for name in linears})
            raise ValueError(f"{pattern!r}: matches no dense linear; those of this model are {known}.")


def _check_whole(name: str, module: nn.Linear) -> None:
    weight = module.weight
    if type(weight.data) is not torch.Tensor or tuple(weight.shape) != (module.out_features, module.in_features):
        raise ValueError(
            f"{name}.weight: is sharded (FSDP, ZeRO-3 or tensor parallelism), and a mask needs the whole matrix; "
            "train with data parallelism (DDP)."
        )


def removal_scores(weight: torch.Tensor, pattern: str) -> torch.Tensor:
    """Magnitudes, infinite where N:M forbids to remove: fp32 `[O, I]`; the lowest go first.

    Of every group the N largest are safe. The others go in the order of their size, over the whole matrix or all, so
    that sparsity grows in steps as small as one weight and ends in exactly N:M.
    """
    scores = magnitude_scores(weight)
    if kept_of_group(pattern) is None:
        return scores
    return scores.masked_fill(select_mask(scores, None, pattern), math.inf)


def shared_counts(
    scores: Sequence[Callable[[], torch.Tensor]], total: int, lowest: Sequence[int], highest: Sequence[int]
) -> list[int]:
    """How many weights of each of P matrices go under one threshold over all, within bounds of each.

    The threshold is exact and no scores but those of one matrix are in memory: they are counted in buckets, of the
    first bits of all, then of the last bits in the bucket of the threshold. Of scores equal to it the first
    matrices' go.

    Args:
        scores: functions that give the scores of a matrix, fp32, none below zero.
        total: how many go of all together.
        lowest, highest: bounds of each matrix.

    Raises:
        ValueError: a total that the bounds do not allow.
    """
    if not sum(lowest) <= total <= sum(highest):
        raise ValueError(f"total={total}: must be within the sums of the bounds, {sum(lowest)} and {sum(highest)}.")
    bounds = torch.tensor([lowest, highest]).unsqueeze(-1)  # [2, P, 1]
    below = torch.zeros(len(scores), 1, dtype=torch.long)  # weights under the bucket
    bucket = 0
    for shift in (BUCKET_BITS, 0):
        counts = torch.stack([_bucket_counts(matrix(), shift, bucket) for matrix in scores])  # [P, buckets]
        reached = torch.cat((below, below + counts.cumsum(-1)), dim=-1).clamp(bounds[0], bounds[1])
        index = int(torch.searchsorted(reached[:, 1:].sum(0), total))
        below, bucket = below + counts[:, :index].sum(-1, keepdim=True), index
    under, at = reached[:, index], reached[:, index + 1]
    room = at - under
    spare = total - int(under.sum()) - (room.cumsum(0) - room)  # [P], what is left when it is a matrix's turn
    return (under + torch.minimum(room, spare.clamp(min=0))).tolist()


def _bucket_counts(scores: torch.Tensor, shift: int, bucket: int) -> torch.Tensor:
    """How many scores fall in each bucket: int64 `[2^16]`. The bits of fp32 numbers above zero have their order."""
    bits = scores.contiguous().view(torch.int32).flatten()
    if shift == 0:
        bits = bits[bits >> BUCKET_BITS == bucket] & (1 << BUCKET_BITS) - 1
    return torch.bincount(bits >> shift, minlength=1 << BUCKET_BITS).cpu()


class GradualPruning(TrainerCallback):
    """Grows masks of the smallest weights from a first sparsity to a last one, and keeps removed weights at zero.

    From `start_step` to `end_step`, both included, every `pruning_frequency` optimizer steps and at the last one the
    smallest weights go until the sparsity of the step is reached. Removed weights are set to zero after every
    optimizer step, whatever the optimizer did to them, and take no gradient, so that clipping and reported norms are
    those of the weights that are left. A checkpoint of any step has the zeros of that step; training that resumes from
    it goes on with the same masks, which follow from the step and the zeros. Every process of data parallelism finds
    the same masks, for its weights are the same. A mask takes a byte a weight.

    Logs carry the measured `sparsity`. `pack_zeros` turns the trained model into one that stores its zeros as bits.

    Args:
        target_sparsity: share of weights to remove; with N:M left out, for it follows.
        start_step, end_step: optimizer steps done when the first and the last weights go; equal, all go at once.
        pruning_frequency: optimizer steps between; each costs a pass over all weights.
        initial_sparsity: what goes at `start_step`.
        sparsity_decay_type: `"cubic"` (the paper's), `"linear"`, or Intel Neural Compressor's `"exp"`, `"cos"` and
            `"cube"`, which remove most late.
        pattern: `"unstructured"`, or `"N:M"`, N kept of every M columns.
        pruning_scope: `"local"` removes the same share of every matrix, `"global"` what lies under one threshold.
        min_sparsity_ratio_per_op, max_sparsity_ratio_per_op: bounds of each matrix under a global threshold; before
            the sparsity reaches the lower bound, all matrices have the same.
        include, exclude: names or globs of modules, or of ends of their names (`q_proj`, `mlp.*`, `layers.0`, the
            factor `q_proj.a`), with all that lies in them; by default all linears.
        heads: whether linears outside of the body go too: a language-model head with the embedding it is tied to, a
            classifier. In a model that is not of transformers, only what shares an embedding counts as one: exclude
            others.

    Raises:
        ValueError: a setting outside its range; at the start of training, patterns that match nothing, weights that
            are sharded, or an `end_step` that training does not reach.
    """

    def __init__(
        self,
        target_sparsity: float | None = None,
        *,
        end_step: int,
        start_step: int = 0,
        pruning_frequency: int = 10,
        initial_sparsity: float = 0.0,
        sparsity_decay_type: str = "cubic",
        pattern: str = "unstructured",
        pruning_scope: str = "local",
        min_sparsity_ratio_per_op: float = 0.0,
        max_sparsity_ratio_per_op: float = 0.98,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        heads: bool = False,
    ):
        self.group = kept_of_group(pattern)
        try:
            self.target_sparsity = check_sparsity(target_sparsity, pattern)
        except ValueError as error:
            raise ValueError(f"target_{error}".replace("leave sparsity out", "leave target_sparsity out")) from None
        self.start_step, self.end_step, self.pruning_frequency = start_step, end_step, pruning_frequency
        self.initial_sparsity, self.sparsity_decay_type = initial_sparsity, sparsity_decay_type
        self.pattern, self.pruning_scope = pattern, pruning_scope
        self.min_sparsity_ratio_per_op = min_sparsity_ratio_per_op
        self.max_sparsity_ratio_per_op = max_sparsity_ratio_per_op
        self.include, self.exclude, self.heads = tuple(include), tuple(exclude), heads
        for name, patterns in (("include", include), ("exclude", exclude)):
            if isinstance(patterns, str):
                raise ValueError(f"{name}={patterns!r}: must be a list of names or globs, such as [{patterns!r}].")
        self._check_steps()
        self._check_shares()
        self.sparsities: dict[str, float] = {}
        self._linears: dict[str, nn.Linear] = {}
        self._removed: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def _check_steps(self) -> None:
        for name, least in (("start_step", 0), ("end_step", self.start_step), ("pruning_frequency", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r}: must be an integer of at least {least}.")

    def _check_shares(self) -> None:
        for name, legal in (("sparsity_decay_type", DECAYS), ("pruning_scope", SCOPES)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {list(legal)}.")
        target = self.target_sparsity
        for name, low, high in (
            ("initial_sparsity", 0, target),
            ("min_sparsity_ratio_per_op", 0, target),
            ("max_sparsity_ratio_per_op", target, 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name}={value!r}: must be from {low} to {high}, as target_sparsity is {target}.")

    @property
    def sparsity(self) -> float:
        """The share of weights removed, of all those chosen together."""
        sizes = {name: linear.weight.numel() for name, linear in self._linears.items()}
        removed = sum(share * sizes[name] for name, share in self.sparsities.items())
        return removed / sum(sizes.values()) if removed else 0.0

    def last_update(self, step: int) -> int | None:
        """The last step at which weights go that is not after `step`; `None` before the first."""
        if step < self.start_step:
            return None
        if step >= self.end_step:
            return self.end_step
        return step - (step - self.start_step) % self.pruning_frequency

    def sparsity_of(self, update: int) -> float:
        """The share of weights to be gone after an update."""
        steps = self.end_step - self.start_step
        progress = (update - self.start_step) / steps if steps else 1.0
        return sparsity_at(progress, self.initial_sparsity, self.target_sparsity, self.sparsity_decay_type)

    def on_train_begin(self, args, state, control, *, model: nn.Module, **kwargs):
        if self.end_step > state.max_steps:
            raise ValueError(
                f"end_step={self.end_step}: training ends at step {state.max_steps}, before the target sparsity is "
                "reached; lower end_step, or train longer."
            )
        self._release()
        self.sparsities = {}
        self._linears = prunable_linears(model, self.include, self.exclude, self.heads)
        for name, linear in self._linears.items():
            if linear.weight.requires_grad:
                self._hooks.append(linear.weight.register_hook(partial(self._live_gradient, name)))
        # At the first step, or where training resumes: the zeros of the checkpoint are the smallest weights.
        if (update := self.last_update(state.global_step)) is not None:
            self._remove(self.sparsity_of(update))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._set_zeros()

    def on_step_end(self, args, state, control, **kwargs):
        if self.last_update(state.global_step) == state.global_step:
            self._remove(self.sparsity_of(state.global_step))

    def on_log(self, args, state, control, *, logs: dict[str, float], **kwargs):
        logs["sparsity"] = round(self.sparsity, 6)
        state.log_history[-1]["sparsity"] = logs["sparsity"]

    def on_train_end(self, args, state, control, **kwargs):
        reached, stopped = self.sparsity, state.global_step < self.end_step
        for name, linear in self._linears.items():
            self.sparsities[name] = float((linear.weight == 0).double().mean())
        if stopped or self.sparsity < reached - 1e-9:
            reason = f"training stopped at step {state.global_step}" if stopped else "the best model is an earlier one"
            logger.warning(
                f"sparsity={self.sparsity:.4f} at the end, target_sparsity={self.target_sparsity:.4f}: {reason}, and "
                f"end_step is {self.end_step}; train on, or take the last checkpoint."
            )
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._removed = [], {}

    def _live_gradient(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        removed = self._removed.get(name)
        return gradient if removed is None else gradient.masked_fill(removed, 0)

    def _remove(self, sparsity: float) -> None:
        """Finds the masks of a sparsity anew, and sets to zero what they remove."""
        for name, count in zip(self._linears, self._counts(sparsity), strict=True):
            scores = self._scores(name)
            kept = keep_highest(scores.reshape(1, -1), scores.numel() - count)
            self._removed[name] = ~kept.view(scores.shape)
            self.sparsities[name] = count / scores.numel()
        self._set_zeros()

    def _counts(self, sparsity: float) -> list[int]:
        """How many weights of each matrix go."""
        removable = [self._removable(linear) for linear in self._linears.values()]
        share = sparsity if self.group is None else sparsity / self.target_sparsity
        if self.pruning_scope == "local":
            return [round(share * count) for count in removable]
        least, most = self.min_sparsity_ratio_per_op, self.max_sparsity_ratio_per_op
        if self.group is not None:  # which bounds every matrix itself
            least, most = 0.0, 1.0
        lowest = [int(min(least, share) * count) for count in removable]
        highest = [int(most * count) for count in removable]
        total = min(max(round(share * sum(removable)), sum(lowest)), sum(highest))
        return shared_counts([partial(self._scores, name) for name in self._linears], total, lowest, highest)

    def _removable(self, linear: nn.Linear) -> int:
        if self.group is None:
            return linear.weight.numel()
        return linear.weight.numel() - math.prod(LinearForm(sparsity=self.pattern).values_shape(*linear.weight.shape))

    def _scores(self, name: str) -> torch.Tensor:
        weight = self._linears[name].weight.detach()
        if weight.isnan().any():
            raise ValueError(f"{name}.weight: has values that are not a number; training diverged, lower its rate.")
        return removal_scores(weight, self.pattern)

    @torch.no_grad()
    def _set_zeros(self) -> None:
        for name, removed in self._removed.items():
            self._linears[name].weight.masked_fill_(removed, 0)


Model = TypeVar("Model", bound=LLMKernelPreTrainedModel)


def pack_zeros(model: Model, pattern: str = "unstructured") -> Model:
    """A model of this family with its zeros stored as bits: the same logits, smaller files, masks that stay.

    Where a dense matrix, of a block or a factor of its low rank, a dense embedding or a dense head has enough zeros to
    take fewer bytes so, it becomes a bitmask; with N:M given, those that fit it become N:M. All else is as it was.
    `save_pretrained` of the result is a folder that plain `AutoModel` loads; training goes on with the same zeros.

    Args:
        model: in memory, in the dtype it is to be stored in.
        pattern: `"unstructured"` or `"N:M"`.

    Returns:
        A new model on the same device; the given one stays as it is and shares no tensor with it.

    Raises:
        ValueError: a model of another family, or an unknown pattern.
    """
    kept_of_group(pattern)
    if not isinstance(model, LLMKernelPreTrainedModel):
        raise ValueError(
            f"model={type(model).__name__}: is not of this family; save it, bring the folder into this family with "
            "convert_checkpoint, and load that."
        )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = _pack_blocks(state, model, pattern)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for field, path in (("embed_tokens_form", f"{_body(model)}embed_tokens"), ("lm_head_form", "lm_head")):
        if (form := _pack(state, path, pattern)) is not None:
            setattr(config, field, form.to_dict())
    attention = model.config._attn_implementation
    packed = type(model).from_pretrained(
        None, config=config, state_dict=state, dtype=model.dtype, attn_implementation=attention
    )
    if model.can_generate():
        packed.generation_config = copy.deepcopy(model.generation_config)
    return cast(Any, packed).to(model.device).train(model.training)


def _body(model: LLMKernelPreTrainedModel) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _pack_blocks(state: dict[str, torch.Tensor], model: LLMKernelPreTrainedModel, pattern: str) -> LLMKernelConfig:
    """Packs the matrices of all blocks in a state dict; returns the configuration that says so."""
    layers = own_layers(model.config)
    for index, layer in enumerate(layers):
        for name in matrix_names(layer):
            form = _pack(state, f"{_body(model)}layers.{index}.{module_path(name)}", pattern)
            if form is not None:
                set_form(layer, name, form)
    return merge_layers(model.config, layers)


def _pack(state: dict[str, torch.Tensor], path: str, pattern: str) -> LinearForm | None:
    """Replaces a dense weight by its packed tensors, where there is one that gains; returns their form."""
    weight = state.get(f"{path}.weight")
    form = None if weight is None else sparse_form(weight, pattern)
    if weight is None or form is None:
        return None
    del state[f"{path}.weight"]
    state |= {f"{path}.{suffix}": tensor for suffix, tensor in pack_weight(weight, form).items()}
    return form


def sparse_form(weight: torch.Tensor, pattern: str = "unstructured") -> LinearForm | None:
    """The form that stores all nonzeros of a weight `[O, I]`: N:M where that is asked for and fits, else a bitmask.

    `None` where the dense weight takes no more bytes.
    """
    forms = [LinearForm(sparsity="bitmask", nnz=int(weight.count_nonzero()))]
    if pattern != "unstructured":
        forms.insert(0, LinearForm(sparsity=pattern))
    for form in forms:
        values = math.prod(form.values_shape(*weight.shape)) * weight.element_size()
        mask = len(weight) * math.ceil(weight.shape[1] / 8)
        fits = form.sparsity == "bitmask" or bool((largest_mask(weight, form) | (weight == 0)).all())
        if fits and values + mask < weight.nbytes:
            return form
    return None
