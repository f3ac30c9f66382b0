"""What a model is and costs: perplexity, speed, memory, inventory, and the report made of them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inventory import Inventory, inspect
    from .measure import compare, evaluate
    from .quality import Perplexity, perplexity
    from .report import Report, write_report
    from .speed import Speed, choose_dtype, measure_speed


__all__ = [
    "Inventory",
    "Perplexity",
    "Report",
    "Speed",
    "choose_dtype",
    "compare",
    "evaluate",
    "inspect",
    "measure_speed",
    "perplexity",
    "write_report",
]

# Imported on first use: the command line looks at this folder without waiting for torch.
_MODULE_OF = {
    **dict.fromkeys(("Inventory", "inspect"), "inventory"),
    **dict.fromkeys(("compare", "evaluate"), "measure"),
    **dict.fromkeys(("Perplexity", "perplexity"), "quality"),
    **dict.fromkeys(("Report", "write_report"), "report"),
    **dict.fromkeys(("Speed", "choose_dtype", "measure_speed"), "speed"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
