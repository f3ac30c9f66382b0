"""Compression: a recipe of stages, run block by block over a checkpoint.

Reading order: `recipe` (what a user writes) -> `registry` and `stage` (how a method is added) -> `pipeline` -> `plan`
-> `sweep` -> `block`, `calibration` and `statistics` (what a stage sees) -> the methods, one file each.

The functions are imported when asked for, so that the command line starts without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Compression, compress
    from .recipe import Calibration, Evaluation, Recipe

_MODULE_OF = {
    **dict.fromkeys(("Compression", "compress"), "pipeline"),
    **dict.fromkeys(("Calibration", "Evaluation", "Recipe"), "recipe"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


__all__ = ["Calibration", "Compression", "Evaluation", "Recipe", "compress"]
