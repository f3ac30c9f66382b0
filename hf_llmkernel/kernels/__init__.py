"""Native kernels: compressed linears and whole decoding steps on the CPU, each with its twin in torch.

    with hf_llmkernel.kernels.disabled():
        model.generate(...)  # on torch
    with hf_llmkernel.kernels.floating_activations():
        model.generate(...)  # integer weights by floating activations

Built with the package or by `python -m hf_llmkernel.kernels.build`; without the library torch serves.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .library import disabled, floating_activations, is_enabled, isa

__all__ = ["disabled", "floating_activations", "is_enabled", "isa"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import library  # brings torch, which the build of the library does without

    return getattr(library, name)
