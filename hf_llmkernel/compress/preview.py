"""The plan of a recipe before any work: per stage what changes, sizes expected, time, memory and disk estimated.

Everything comes from the configuration, but for the speed of this machine's products, which are timed for a moment.
"""

import errno
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..checkpoint import check_disk_space, check_output
from ..model.configuration_llm_kernel import LLMKernelConfig
from .block import SITES, matrix_names, matrix_shape
from .check import source_shapes, source_texts
from .pipeline import needed_disk_bytes
from .plan import own_layers, plan_stages, stored_sizes
from .recipe import Recipe
from .run import phases
from .stage import Stage
from .walk import BATCH_TOKENS, fast_products

LIBRARY_BYTES = 480 << 20  # torch, transformers and what they import
SUMS_OF_GRAM = 7  # an fp32 matrix of inputs by inputs, its symmetric copy, and up to two factors in fp64


@dataclass(frozen=True)
class Preview:
    """What a recipe would do.

    Args:
        source: the checkpoint.
        parameters, weight_bytes: of the source as the recipe's dtype stores it.
        stages: one entry a stage: its settings, under `result` what it makes of the layers, `parameters` and
            `weight_bytes` after it, and whether these are `estimated`, because it decides over all layers first.
        sweeps: how often the blocks are walked over.
        seconds, peak_memory_bytes, disk_bytes: estimates, of the compression without the measurement.
    """

    source: str
    parameters: int
    weight_bytes: int
    stages: list[dict[str, Any]]
    sweeps: int
    seconds: float
    peak_memory_bytes: int
    disk_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def preview(
    model: str | Path, recipe: Recipe | dict[str, Any] | str | Path, output_dir: str | Path | None = None
) -> Preview:
    """Checks a recipe against a model, its texts and this machine, and says what it would do; nothing is written.

    Args:
        model: folder, `.gguf` file or Hub id of this family or of one that `convert_checkpoint` knows.
        recipe: as `compress` takes it.
        output_dir: where the result would be; by default not checked.

    Raises:
        ValueError: a recipe that does not fit the model, a text that will not do, or what `compress` would refuse.
        OSError: no space for the output, or less memory than the estimate.
    """
    recipe = Recipe.load(recipe)
    config, dtype, has_head = source_shapes(model, recipe)
    planned = plan_stages(config, recipe.stages, dtype, has_head)
    parameters, weight_bytes = stored_sizes(config, dtype, has_head)
    source_texts(model, recipe, config)
    _check_machine(output_dir, estimate_memory(config, recipe), needed_disk_bytes(config, weight_bytes, recipe))
    stages = [
        {
            **stage.to_dict(),
            "result": step.result,
            "parameters": step.parameters,
            "weight_bytes": step.weight_bytes,
            "estimated": any(earlier.is_global for earlier in recipe.stages[: number + 1]),
        }
        for number, (stage, step) in enumerate(zip(recipe.stages, planned, strict=True))
    ]
    groups = phases(recipe.stages)
    surveys = sum(group[0].is_global and group[0].needs_data for group in groups)
    return Preview(
        source=str(model),
        parameters=parameters,
        weight_bytes=weight_bytes,
        stages=stages,
        sweeps=len(groups) + surveys,
        seconds=round(estimate_seconds(config, recipe, surveys), 1),
        peak_memory_bytes=estimate_memory(config, recipe),
        disk_bytes=needed_disk_bytes(config, weight_bytes, recipe),
    )


def _check_machine(output_dir: str | Path | None, memory_bytes: int, disk_bytes: int) -> None:
    if output_dir is not None:
        check_output(output_dir)
        check_disk_space(output_dir, disk_bytes)
    total = psutil.virtual_memory().total
    if memory_bytes > total:
        raise OSError(
            errno.ENOMEM, f"memory: about {memory_bytes / 1e9:.1f} GB needed, this machine has {total / 1e9:.1f} GB"
        )


def estimate_seconds(config: LLMKernelConfig, recipe: Recipe, surveys: int) -> float:
    """Seconds of forwards, statistics and solves at the speed of products on this machine now."""
    tokens = recipe.calibration.samples * recipe.calibration.length if recipe.needs_data else 0
    layers = own_layers(config)
    values = sum(rows * columns for layer in layers for rows, columns in layer.linear_shapes().values())
    runs = surveys + sum(any(stage.needs_data for stage in group) for group in phases(recipe.stages))
    statistics = sum(_gram_products(stage, layer) for stage in recipe.stages for layer in layers)
    solves = sum(_solve_products(stage, layer) for stage in recipe.stages for layer in layers)
    searches = sum(stage.search_work(config)[0] for stage in recipe.stages)
    fast, exact = product_rate(fast=True), product_rate(fast=False)
    forwards = 1.6 * runs * tokens * values + 1.3 * searches
    return 2 * (forwards / fast + 0.7 * tokens * statistics / exact + solves / exact)


def _gram_products(stage: Stage, layer: LLMKernelConfig) -> int:
    """Products a token of the Gram matrices that a stage asks for."""
    widths = {site: matrix_shape(layer, SITES[site][-1])[1] for site in SITES}
    return sum(widths[site] ** 2 for site, need in stage.needs(layer).items() if need == "gram")


def _solve_products(stage: Stage, layer: LLMKernelConfig) -> float:
    shapes = [matrix_shape(layer, name) for name in stage.chosen(matrix_names(layer))]
    return stage.solve_products * sum(rows * columns**2 for rows, columns in shapes)


def product_rate(fast: bool) -> float:
    """Multiplications and additions a second, half of each, of fp32 products of the walk's size."""
    left, right = torch.ones(BATCH_TOKENS, 768), torch.ones(768, 768)

    def run() -> float:
        started = time.perf_counter()
        torch.mm(left, right)
        return time.perf_counter() - started

    def rate() -> float:
        return 2 * left.numel() * 768 / min(run() for _ in range(5))

    if fast:
        with fast_products():
            return rate()
    return rate()


def estimate_memory(config: LLMKernelConfig, recipe: Recipe) -> int:
    """Bytes at the peak: the libraries, a search, and the embedding or a block with activations and largest solve."""
    embedding = 2 * config.vocab_size * config.hidden_size * 4
    blocks = []
    for layer in own_layers(config):
        shapes = layer.linear_shapes()
        values = sum(rows * columns for rows, columns in shapes.values())
        grams = [stage.needs(layer).values() for stage in recipe.stages]
        widest = max(columns for _, columns in shapes.values()) if any("gram" in needs for needs in grams) else 0
        wide = max(max(shape) for shape in shapes.values())
        blocks.append(4 * (2 * values + SUMS_OF_GRAM * widest**2 + 6 * BATCH_TOKENS * wide))
    searched = max(stage.search_work(config)[1] for stage in recipe.stages)
    return LIBRARY_BYTES + searched + max(embedding, *blocks)
