"""Values in another floating dtype, and what that loses; what integers and low ranks stand for in it.

Shapes: O out_features, I in_features.
"""

from collections.abc import Callable
from functools import partial

import torch

from ..model.configuration_llm_kernel import LinearForm
from ..model.linear_llm_kernel import unpack_weight


def cast_values(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, int]]:
    """Values in a dtype, those beyond its range as its largest number, and how many lost what."""
    range_ = torch.finfo(dtype)
    rounded = values.to(dtype)
    overflowed = rounded.isinf()
    clamped = values.clamp(range_.min, range_.max).to(dtype) if overflowed.any() else rounded
    small = rounded.abs() < range_.smallest_normal
    gone = (rounded == 0) & (values != 0)
    kept = small & (rounded != 0)
    return clamped, {
        "overflowed": int(overflowed.sum()),
        "underflowed": int(gone.sum()),
        "subnormal": int((kept & (rounded.to(values.dtype) != values)).sum()),
    }


def check_products(
    name: str, form: LinearForm, shape: tuple[int, int], dtype: torch.dtype, read: Callable[[str], torch.Tensor]
) -> None:
    """Checks what integers and low ranks stand for, which is computed in the model's dtype when the model is used.

    A code times its scale, or a factor times the other, can be beyond a range that all stored values are within. Only
    where the largest of them might be is the weight computed.

    Args:
        name: of the linear or embedding.
        form: how it is stored.
        shape: (O, I).
        dtype: of the model.
        read: one of the stored tensors by its suffix, as `LinearForm.stored_tensors` names them.

    Raises:
        ValueError: values beyond the range of the dtype.
    """
    if form.rank is not None:
        shapes = {"a": (form.rank, shape[1]), "b": (shape[0], form.rank)}
        for side, factor in zip("ab", form.factors, strict=True):
            own = partial(_of_factor, read, side)
            check_products(f"{name}.{side}", factor, shapes[side], dtype, own)
    elif form.bits == 16:
        return
    if _bound(form, read) <= torch.finfo(dtype).max:
        return
    stored = {suffix: read(suffix) for suffix in form.stored_tensors(*shape) if suffix.rpartition(".")[2] != "bias"}
    wide = {suffix: tensor.float() if tensor.is_floating_point() else tensor for suffix, tensor in stored.items()}
    weight = unpack_weight(wide, form, shape[1], torch.float32)
    if not weight.to(dtype).isfinite().all():
        raise ValueError(
            f"dtype={str(dtype)[6:]}: {name} stands for values up to {_largest(weight):.4g}, and the largest number is "
            f"{torch.finfo(dtype).max:.5g}; choose bfloat16 or float32."
        )


def _bound(form: LinearForm, read: Callable[[str], torch.Tensor]) -> float:
    """A number that no value of a weight is above, from few of its stored tensors."""
    if form.rank is not None:
        a, b = (_bound(own, partial(_of_factor, read, side)) for side, own in zip("ab", form.factors, strict=True))
        return a * b * form.rank
    if form.bits == 16:
        return _largest(read("weight" if form.is_dense else "values"))
    zeros = 0.0 if form.symmetric else _largest(read("zero_points"))
    return _largest(read("scales")) * (2**form.bits + zeros)


def _of_factor(read: Callable[[str], torch.Tensor], side: str, suffix: str) -> torch.Tensor:
    return read(f"{side}.{suffix}")


def _largest(values: torch.Tensor) -> float:
    return float(values.float().abs().max()) if values.numel() else 0.0
