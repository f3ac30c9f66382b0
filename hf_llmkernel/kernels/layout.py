"""Weights in the layout that the native kernels read.

A packed weight is written anew, interleaved (native/matrix.h); a dense one of fp32 or bf16 is read where torch has it.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import library
from .library import NATIVE, TYPES, Linear, Matrix, Stored, check

DESCRIPTION = ("kind", "rows", "columns", "group", "scale_type", "zero_type")


@dataclass(frozen=True)
class Layout:
    """A weight `[O, I]`: what `data` holds (numbers of native/llmkernel.h, in the order of `DESCRIPTION`), and it."""

    description: list[int]
    data: torch.Tensor

    def matrix(self) -> Matrix:
        """The structure of the C interface; valid while `data` lives."""
        return Matrix(*self.description, self.data.data_ptr())


def stored_weight(stored: Mapping[str, torch.Tensor], form: Any, out_features: int, in_features: int) -> Stored:
    """The structure of the C interface of a weight as the checkpoint stores it; valid while its tensors live."""
    values, mask = stored["values"], stored.get("mask")
    scales, zero_points = stored.get("scales"), stored.get("zero_points")
    rows_alike = form.sparsity != "bitmask"
    return Stored(
        rows=out_features,
        columns=in_features,
        bits=form.bits,
        value_type=TYPES.get(values.dtype, 0) if form.bits == 16 else 0,
        group=min(form.group_size or in_features, in_features),
        scale_type=0 if scales is None else TYPES[scales.dtype],
        zero_type=0 if zero_points is None else TYPES[zero_points.dtype],
        row_values=form.values_shape(out_features, in_features)[-1] if rows_alike else 0,
        values=values.data_ptr(),
        value_bytes=values.nbytes,
        mask=None if mask is None else mask.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        zeros=None if zero_points is None else zero_points.data_ptr(),
    )


def packed_layout(stored: Mapping[str, torch.Tensor], form: Any, out_features: int, in_features: int) -> Layout | None:
    """The kernel layout of a packed weight, or `None` where the kernels have none for its form.

    Args:
        stored: `values`, `mask`, `scales`, `zero_points` of a `PackedWeight`, on the CPU.
        form: its `LinearForm`.
    """
    assert NATIVE is not None
    stored = {name: tensor.detach().contiguous() for name, tensor in stored.items()}
    weight, matrix, size = stored_weight(stored, form, out_features, in_features), Matrix(), ctypes.c_int64()
    if NATIVE.llmk_plan(ctypes.byref(weight), ctypes.byref(matrix), ctypes.byref(size)) is not None:
        return None
    data = torch.empty(size.value, dtype=torch.uint8)
    check(NATIVE.llmk_pack(ctypes.byref(weight), ctypes.byref(matrix), data.data_ptr(), library.threads()))
    return Layout([getattr(matrix, name) for name in DESCRIPTION], data)


def dense_layout(weight: torch.Tensor) -> Layout | None:
    """A dense weight `[O, I]` as it is, or `None` where it is neither fp32 nor bf16, or not contiguous."""
    kind = {torch.float32: library.F32, torch.bfloat16: library.BF16}.get(weight.dtype)
    if kind is None or not weight.is_contiguous():
        return None
    return Layout([kind, *weight.shape, weight.shape[1], 0, 0], weight.detach())


def linear_of(
    first: Layout, second: Layout | None, bias: torch.Tensor | None, adapter: tuple[Layout, Layout] | None = None
) -> Linear:
    """A linear, or a low-rank pair, with its fp32 bias and an adapter's two factors; valid while all of these live."""
    layouts = (first, second, *(adapter or (None, None)))
    matrices = [Matrix() if layout is None else layout.matrix() for layout in layouts]
    return Linear(*matrices, None if bias is None else bias.data_ptr())
