"""The one list of methods: importing it registers every stage."""

from . import cast, refit
from .factorize import stage as factorize
from .prune import depth as drop_layers
from .prune import hidden as prune_hidden
from .prune import stage as prune
from .quantize import bitsandbytes
from .quantize import stage as quantize
from .search import stage as search
from .sparsify import stage as sparsify

__all__ = [
    "bitsandbytes",
    "cast",
    "drop_layers",
    "factorize",
    "prune",
    "prune_hidden",
    "quantize",
    "refit",
    "search",
    "sparsify",
]
