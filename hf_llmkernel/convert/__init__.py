"""Conversion: other families' checkpoints in, stock architectures out.

The functions are imported when asked for, so that the command line starts without torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conversion import Conversion
    from .incoming import convert_checkpoint
    from .outgoing import export_checkpoint

_HOMES = {"Conversion": "conversion", "convert_checkpoint": "incoming", "export_checkpoint": "outgoing"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


__all__ = ["Conversion", "convert_checkpoint", "export_checkpoint"]
