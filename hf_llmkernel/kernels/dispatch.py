"""What the model's files ask of this package: the object in the slot `KERNELS` of `linear_llm_kernel.py`."""

from collections.abc import Mapping
from typing import Any

import torch

from . import library, step
from .layout import Layout, packed_layout
from .ops import OPERATORS
from .paths import PATHS

INTERFACES = (1, 2)  # of what is below, for a checkpoint's own copy of the model's files may be older or newer


class Kernels:
    """The native kernels to a model."""

    operators = OPERATORS  # torch keeps them as long as this object
    is_enabled = staticmethod(library.is_wanted)
    decode = staticmethod(step.decode)
    generating = staticmethod(library.generating)

    def serves(self, input: torch.Tensor) -> bool:
        """Whether activations are such as native linears take, and no gradient has to come back through them.

        Where the library is not there, it says so.
        """
        return (
            input.device.type == "cpu"
            and input.dtype in (torch.float32, torch.bfloat16)
            and type(input) is torch.Tensor
            and not torch.is_autocast_enabled("cpu")
            and not (input.requires_grad and torch.is_grad_enabled())
            and library.is_usable()
        )

    def takes(self, input: torch.Tensor, layout: Layout) -> bool:
        """Whether native linears are the faster path for so many rows."""
        kind, out_features, in_features = layout.description[:3]
        return PATHS.takes(kind, out_features, in_features, input.numel() // max(in_features, 1))

    def layout(
        self, stored: Mapping[str, torch.Tensor], form: Any, out_features: int, in_features: int
    ) -> Layout | None:
        """See `packed_layout`."""
        return packed_layout(stored, form, out_features, in_features)

    def linear(self, input: torch.Tensor, layout: Layout, bias: torch.Tensor | None) -> torch.Tensor:
        """`x Wᵀ + bias` of a packed linear."""
        return torch.ops.llmkernel.linear(input, layout.data, layout.description, bias)


def native_kernels(interface: int) -> Kernels | None:
    """The kernels, or `None` where the caller speaks another interface."""
    return Kernels() if interface in INTERFACES else None
