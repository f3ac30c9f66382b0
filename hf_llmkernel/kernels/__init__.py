"""Native kernels: compressed linears and whole decoding steps on the CPU, each with its twin in torch.

The model's files ask for `KERNELS` (see `linear_llm_kernel.py`); without the library, built by `build.py`, it is `None`
and torch serves.
"""

from .library import disabled, is_enabled, isa

__all__ = ["disabled", "is_enabled", "isa"]
