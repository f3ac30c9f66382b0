"""LoRA adapters of peft beside linears, as native steps take them.

Shapes: O out_features, I in_features, R the ranks of all active adapters together.
"""

from typing import Any

import torch
from torch import nn

from .layout import Layout, dense_layout


class Unplanned(Exception):
    """A model, or a part of it, that native steps do not cover; torch serves it."""


def is_adapted(module: Any) -> bool:
    """Whether it is a linear of peft with LoRA adapters beside it."""
    kind = type(module)
    return kind.__module__ == "peft.tuners.lora.layer" and kind.__name__ == "Linear"


def adapter_settings(module: Any) -> tuple[Any, ...]:
    """What of a linear with adapters decides its output, beside its modules and tensors."""
    return (
        module.disable_adapters,
        tuple(module.active_adapters),
        tuple(module.merged_adapters),
        tuple(module.scaling.items()),
        tuple(module.lora_variant),
        tuple(map(_drops, module.lora_dropout.values())),
    )


def _drops(dropout: nn.Module) -> bool:
    return dropout.training and type(dropout) is not nn.Identity


def adapter_layouts(module: Any) -> tuple[Layout, Layout] | None:
    """The factors `[R, I]` and `[O, R]` of what is added, all active adapters side by side; `None` where nothing is.

    Raises:
        Unplanned: adapters that are more than the product of two matrices (DoRA, a bias, dropout), or in another dtype.
    """
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters and module.merged:
        raise Unplanned("an adapter that peft unmerges in its forward")
    if module.disable_adapters or module.merged or not active:
        return None
    pairs = [(module.lora_A[name], module.lora_B[name]) for name in active]
    plain = all(type(factor) is nn.Linear and factor.bias is None for pair in pairs for factor in pair)
    if not plain or any(name in module.lora_variant or _drops(module.lora_dropout[name]) for name in active):
        raise Unplanned("an adapter that is more than two matrices")
    a = torch.cat([a.weight.detach() for a, _ in pairs])
    b = torch.cat([b.weight.detach() * module.scaling[name] for name, (_, b) in zip(active, pairs, strict=True)], 1)
    layouts = dense_layout(a.contiguous()), dense_layout(b.contiguous())
    if layouts[0] is None or layouts[1] is None or a.device.type != "cpu":
        raise Unplanned("an adapter that is neither fp32 nor bf16 on the CPU")
    return layouts[0], layouts[1]
