"""The one list of methods: importing it registers every stage."""

from . import prune_ffn, quantize

__all__ = ["prune_ffn", "quantize"]
