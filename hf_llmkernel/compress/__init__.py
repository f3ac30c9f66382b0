"""Compression: a recipe of stages, run block by block over a checkpoint.

Reading order: `recipe` (what a user writes) -> `registry` and `stage` (how a method is added) -> `pipeline` -> `plan`
-> `sweep` -> `block`, `calibration` and `statistics` (what a stage sees) -> the methods, one file each.

The functions are imported when asked for, so that the command line starts without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cast import Cast
    from .factorize.stage import Factorize
    from .pipeline import Compression, compress
    from .prune.depth import DropLayers
    from .prune.hidden import PruneHidden
    from .prune.stage import PruneFFN, PruneHeads
    from .quantize.bitsandbytes import StoreBitsAndBytes
    from .quantize.stage import Quantize
    from .recipe import Calibration, Evaluation, Recipe
    from .refit import Refit
    from .search.stage import Search
    from .sparsify.stage import Sparsify

_MODULE_OF = {
    **dict.fromkeys(("Compression", "compress"), "pipeline"),
    **dict.fromkeys(("Calibration", "Evaluation", "Recipe"), "recipe"),
    # Stages, whose names in recipes are `drop_layers`, `prune_heads` and so on.
    "DropLayers": "prune.depth",
    **dict.fromkeys(("PruneFFN", "PruneHeads"), "prune.stage"),
    "PruneHidden": "prune.hidden",
    "Refit": "refit",
    "Factorize": "factorize.stage",
    "Sparsify": "sparsify.stage",
    "Quantize": "quantize.stage",
    "StoreBitsAndBytes": "quantize.bitsandbytes",
    "Cast": "cast",
    "Search": "search.stage",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


__all__ = [
    "Calibration",
    "Cast",
    "Compression",
    "DropLayers",
    "Evaluation",
    "Factorize",
    "PruneFFN",
    "PruneHeads",
    "PruneHidden",
    "Quantize",
    "Recipe",
    "Refit",
    "Search",
    "Sparsify",
    "StoreBitsAndBytes",
    "compress",
]
