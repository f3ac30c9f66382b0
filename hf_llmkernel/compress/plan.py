"""What a recipe makes of a model, from its configuration alone: shapes, forms, and what they reach.

Reading order: plan -> layers on their own -> layers as one configuration again.
"""

import copy
from typing import Any, cast

from ..model.configuration_llm_kernel import LLMKernelConfig
from .recipe import Recipe

LAYER_FIELDS = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "linear_forms", "skip")


def plan_recipe(config: LLMKernelConfig, recipe: Recipe) -> list[dict[str, Any]]:
    """What each stage would make of a model, from its configuration alone.

    Returns:
        One entry a stage, as in `Compression.stages`.

    Raises:
        ValueError: a stage that cannot be, saying where and why.
    """
    config = copy.deepcopy(config)
    layers = own_layers(config)
    outcome = []
    for stage in recipe.stages:
        stage.check_layers(len(layers))
        stage.plan_top(config)
        results = {index: stage.plan(layer) for index, layer in enumerate(layers) if stage.covers(index)}
        outcome.append({**stage.to_dict(), "result": _variants(results)})
    merge_layers(config, layers)
    return outcome


def _variants(results: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Distinct results, each with the layers it holds for."""
    variants: list[dict[str, Any]] = []
    for index, result in results.items():
        known = next((variant for variant in variants if {**variant, "layers": 0} == {**result, "layers": 0}), None)
        if known is None:
            variants.append({**result, "layers": [index]})
        else:
            known["layers"].append(index)
    return variants


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
