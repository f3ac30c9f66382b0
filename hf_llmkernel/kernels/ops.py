"""The native linears as torch operators: `torch.ops.llmkernel.linear` and `low_rank_linear`.

They run on the CPU alone and have fake implementations, so that `torch.compile` and export see shapes and dtypes.
"""

import ctypes

import torch

from . import library
from .layout import Layout, linear_of
from .library import NATIVE, TYPES, check

OPERATORS = torch.library.Library("llmkernel", "DEF")
OPERATORS.define("linear(Tensor x, Tensor data, int[] description, Tensor? bias) -> Tensor")
OPERATORS.define(
    "low_rank_linear(Tensor x, Tensor a, int[] a_description, Tensor b, int[] b_description, Tensor? bias) -> Tensor"
)


def linear(x: torch.Tensor, data: torch.Tensor, description: list[int], bias: torch.Tensor | None) -> torch.Tensor:
    """`x Wᵀ + bias`: `[..., O]` in the dtype of x `[..., I]`, fp32 or bf16, by a weight in kernel layout."""
    return _apply(x, Layout(description, data), None, bias)


def low_rank_linear(
    x: torch.Tensor,
    a: torch.Tensor,
    a_description: list[int],
    b: torch.Tensor,
    b_description: list[int],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`(x Aᵀ) Bᵀ + bias` by two weights in kernel layout, A `[R, I]` and B `[O, R]`, in one call."""
    return _apply(x, Layout(a_description, a), Layout(b_description, b), bias)


def _apply(x: torch.Tensor, first: Layout, second: Layout | None, bias: torch.Tensor | None) -> torch.Tensor:
    if NATIVE is None:
        raise RuntimeError("native kernels: the library is not built; run python -m hf_llmkernel.kernels.build")
    if x.dtype not in (torch.float32, torch.bfloat16) or x.shape[-1] != first.description[2]:
        raise ValueError(f"x: {x.dtype} {list(x.shape)} must be float32 or bfloat16 [..., {first.description[2]}].")
    x = x.contiguous()
    bias = None if bias is None else bias.detach().float().contiguous()
    y = x.new_empty(*x.shape[:-1], (second or first).description[1])
    structure = linear_of(first, second, bias)
    kind = TYPES[x.dtype]
    rows = x.numel() // max(x.shape[-1], 1)
    call = (ctypes.byref(structure), x.data_ptr(), kind, rows, y.data_ptr(), kind)
    check(NATIVE.llmk_apply(*call, library.rounds_inputs(), library.threads()))
    return y


OPERATORS.impl("linear", linear, "CPU")
OPERATORS.impl("low_rank_linear", low_rank_linear, "CPU")


@torch.library.register_fake("llmkernel::linear", lib=OPERATORS)
def _(x, data, description, bias):
    return x.new_empty(*x.shape[:-1], description[1])


@torch.library.register_fake("llmkernel::low_rank_linear", lib=OPERATORS)
def _(x, a, a_description, b, b_description, bias):
    return x.new_empty(*x.shape[:-1], b_description[1])
