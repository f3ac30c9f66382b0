"""What a recipe makes of a model, from its configuration alone: shapes, forms, sizes, and what they reach.

Reading order: plan -> one stage -> layers on their own -> layers as one configuration again -> sizes.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..checkpoint.bitsandbytes import BitsAndBytes
from ..evaluate.layout import norm_shapes, slots, stored_values
from ..model.configuration_llm_kernel import LAYER_FIELDS, LLMKernelConfig
from .stage import Stage, UnfitForm


@dataclass(frozen=True)
class Planned:
    """A model after a stage.

    Args:
        config: its configuration.
        result: what the stage reached, one entry for all layers that are alike.
        parameters, weight_bytes: stored values and bytes of all tensors; of a global stage an estimate.
    """

    config: LLMKernelConfig
    result: list[dict[str, Any]]
    parameters: int
    weight_bytes: int


def plan_stages(
    config: LLMKernelConfig, stages: tuple[Stage, ...], dtype: torch.dtype, has_head: bool = True
) -> list[Planned]:
    """What each stage in turn would make of a model.

    Raises:
        ValueError: a stage that cannot be, saying where and why.
    """
    planned = []
    config = copy.deepcopy(config)
    config.dtype = dtype
    for stage in stages:
        if quantization := BitsAndBytes.of(config):
            raise ValueError(f"{stage.name}: {_quantized_before(quantization, bool(planned))}")
        if planned and stages[len(planned) - 1].writes_whole and not stage.writes_whole:
            before = stages[len(planned) - 1].name
            raise ValueError(f"{stage.name}: comes behind {before}, which works when all is written; put it before.")
        if stage.writes_whole and any(type(stage) is type(earlier) for earlier in stages[: len(planned)]):
            raise ValueError(f"{stage.name}: comes twice, and works when all is written; leave one out.")
        stage.check_choice(config)
        config, result = plan_stage(config, stage)
        stage.check_result(result)
        planned.append(Planned(config, result, *stored_sizes(config, cast(torch.dtype, config.dtype), has_head)))
    return planned


def plan_stage(config: LLMKernelConfig, stage: Stage) -> tuple[LLMKernelConfig, list[dict[str, Any]]]:
    """The configuration after one stage, what it will decide over all layers assumed, and what it reached."""
    kept = stage.depth(None, config.num_hidden_layers)
    config = config if len(kept) == config.num_hidden_layers else keep_layers(config, kept)
    layers = own_layers(config)
    targets = stage.assume(layers)
    covered = [index for index in range(len(layers)) if stage.covers(index)]
    results = {index: _plan_layer(stage, index, layers[index], targets[index]) for index in covered}
    config = copy.deepcopy(config)
    stage.plan_top(config)
    config = merge_layers(config, layers)
    stage.plan_whole(config)
    return config, variants(results)


def _plan_layer(stage: Stage, index: int, layer: LLMKernelConfig, target: Any) -> dict[str, Any]:
    try:
        return stage.plan(layer, target)
    except UnfitForm as unfit:
        raise unfit.in_layer(index) from None


def _quantized_before(quantization: BitsAndBytes, by_a_stage: bool) -> str:
    """Why no stage comes after linears were stored as bitsandbytes stores them."""
    if by_a_stage:
        return "comes after the stage bitsandbytes, which has to be the last; put it before."
    return f"the checkpoint is quantized already ({quantization.words}); start from the floating checkpoint."


def variants(results: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Distinct results, each with the layers it holds for."""
    found: list[dict[str, Any]] = []
    for index, result in results.items():
        known = next((variant for variant in found if {**variant, "layers": 0} == {**result, "layers": 0}), None)
        if known is None:
            found.append({**result, "layers": [index]})
        else:
            known["layers"].append(index)
    return found


def own_layers(config: LLMKernelConfig) -> list[LLMKernelConfig]:
    """Each layer's configuration, to be changed on its own."""
    return [cast(LLMKernelConfig, copy.deepcopy(layer)) for layer in config.per_layer_config]


def merge_layers(config: LLMKernelConfig, layers: list[LLMKernelConfig]) -> LLMKernelConfig:
    """The configuration of a model with these layers: what most share is global, the rest in `per_layer_config`."""
    fields = config.to_dict()
    fields.pop("per_layer_config", None)
    per_layer: dict[int, dict[str, Any]] = {}
    for name in LAYER_FIELDS:
        values = [getattr(layer, name) for layer in layers]
        # Something left out of a layer is always the layer's own.
        fields[name] = [] if name == "skip" else max(values, key=values.count)
        for index, value in enumerate(values):
            if value != fields[name]:
                per_layer.setdefault(index, {})[name] = value
    return LLMKernelConfig.from_dict({**fields, **({"per_layer_config": per_layer} if per_layer else {})})


def keep_layers(config: LLMKernelConfig, kept: list[int]) -> LLMKernelConfig:
    """The configuration of a model that has only the layers `kept`, in this order, numbered anew."""
    layers = own_layers(config)
    fewer = copy.deepcopy(config)
    fewer.layer_types = [cast(list, config.layer_types)[index] for index in kept]
    fewer.num_hidden_layers = len(kept)
    return merge_layers(fewer, [layers[index] for index in kept])


def stored_sizes(config: LLMKernelConfig, dtype: torch.dtype, has_head: bool = True) -> tuple[int, int]:
    """Values stored, and bytes of all tensors, of a model of this family in a dtype."""
    sizes = [own for _, *own in _tensor_sizes(config, dtype, has_head)]
    return sum(parameters for parameters, _ in sizes), sum(weight_bytes for _, weight_bytes in sizes)


def layer_sizes(layer: LLMKernelConfig, dtype: torch.dtype) -> tuple[int, int]:
    """The same of one layer, from its own configuration."""
    alike = _tensor_sizes(layer, dtype, False)  # of a model whose layers are all like this one
    sizes = [own for name, *own in alike if name.startswith("layers.0.")]
    return sum(parameters for parameters, _ in sizes), sum(weight_bytes for _, weight_bytes in sizes)


def _tensor_sizes(config: LLMKernelConfig, dtype: torch.dtype, has_head: bool) -> Iterator[tuple[str, int, int]]:
    """Name, values and bytes of every norm, linear and embedding."""
    for name, shape in norm_shapes(config, "").items():
        yield name, math.prod(shape), math.prod(shape) * dtype.itemsize
    for slot in slots(config, "", has_head):
        tensors = slot.stored_tensors(dtype)
        itemsizes = {suffix: (getattr(torch, own) if own else dtype).itemsize for suffix, (_, own) in tensors.items()}
        weight_bytes = sum(math.prod(shape or ()) * itemsizes[suffix] for suffix, (shape, _) in tensors.items())
        biases = sum(math.prod(shape or ()) for suffix, (shape, _) in tensors.items() if suffix.endswith("bias"))
        yield slot.name, stored_values(slot.form, slot.out_features, slot.in_features) + biases, weight_bytes
