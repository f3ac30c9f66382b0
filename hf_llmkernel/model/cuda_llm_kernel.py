# Copyright 2026 The hf_llmkernel authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Packed weights as torch's products on CUDA read them.

Written after the sources of torch 2.13, gpt-fast and torchao, and tested without a GPU: by value against the same
operators on the CPU, by shape on tensors that pretend. Nothing here has been measured.

Reading order: which layout serves a form -> each layout, what it holds and how it multiplies.

Shapes: O out_features, I in_features, G groups of columns, P in_features padded, M rows of activations.
"""

import functools
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .configuration_llm_kernel import LinearForm

INT4_GROUPS = (256, 128, 64, 32)  # columns that can share a scale in torch's int4 product
INT4_ROWS = 128  # of activations; of more, dequantizing once is faster (torchao/prototype/hqq/README.md)
INT4_MIDDLE = 8  # of the codes 0..15
TILE = 16  # columns of a tile of tensor cores


@functools.cache
def takes_layouts(device: torch.device) -> bool:
    """Whether a device has the operators: NVIDIA's, of compute capability 8.0 (Ampere) and above."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def layout_kind(form: LinearForm, out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
    """The layout that serves a packed form with activations of a dtype; `None` where none does.

    `"int4"`: codes of 4 bits in bf16, sparse ones where code 8 is exactly zero. `"2:4"`: at most two values in four
    columns, in bf16 or fp16. `"int8"`: codes of 8 bits, none left out.
    """
    exact_zeros = form.sparsity is None or form.symmetric
    if form.bits == 4 and dtype == torch.bfloat16 and exact_zeros and int4_group(form, in_features):
        return "int4"
    fits = out_features % 32 == 0 and in_features % 64 == 0  # the wider rule of torch's two backends
    if is_two_of_four(form) and dtype in (torch.bfloat16, torch.float16) and fits:
        return "2:4"
    group = min(form.group_size or in_features, in_features)
    return "int8" if form.bits == 8 and form.sparsity is None and in_features % group == 0 else None


def is_two_of_four(form: LinearForm) -> bool:
    """Whether an N:M sparsity keeps at most two values of every four columns."""
    if form.sparsity in (None, "bitmask"):
        return False
    kept, group = form.kept_of_group()
    return (kept <= 2 and group % 4 == 0) or (kept, group) == (1, 2)


def int4_group(form: LinearForm, in_features: int) -> int | None:
    """Columns that share a scale in the int4 product: the form's own group, or a part of it with the same scale."""
    group = form.group_size or in_features
    if group >= in_features:
        return 128
    return next((size for size in INT4_GROUPS if group % size == 0), None)


class Int4Weight(NamedTuple):
    """Codes of 4 bits in the order of tensor cores, for `torch._weight_int4pack_mm` (tinygemm).

    It computes with `(code - 8) * scale + zero` in bf16, so a zero point z is stored as `(8 - z) * scale`.
    """

    packed: torch.Tensor  # int32 [ceil(O / 8), P / (16 * tiles), 32, tiles / 2]
    scales_and_zeros: torch.Tensor  # bf16 [P / group_size, ceil(O / 8) * 8, 2]
    group_size: int
    out_features: int

    def linear(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x Wᵀ + bias` of bf16 activations `[M, I]`."""
        columns = self.scales_and_zeros.shape[0] * self.group_size
        rows = F.pad(rows, (0, columns - rows.shape[1])).contiguous()
        output = int4_product(rows, self.packed, self.group_size, self.scales_and_zeros)[:, : self.out_features]
        return output if bias is None else output + bias


def int4_weight(
    codes: torch.Tensor, form: LinearForm, scales: torch.Tensor, zero_points: torch.Tensor | None
) -> Int4Weight:
    """The layout of codes 0..15, uint8 `[O, I]`, with scales and zero points `[O, G]`."""
    out_features, in_features = codes.shape
    size = int4_group(form, in_features)
    tiles = next((tiles for tiles in (8, 4, 2) if in_features % (TILE * tiles) == 0), 8)
    step = max(size, TILE * tiles)
    columns, rows = -(-in_features // step) * step, -out_features % 8
    group = min(form.group_size or in_features, in_features)
    own = (torch.arange(0, columns, size, device=codes.device) // group).clamp(max=scales.shape[1] - 1)
    scale = scales[:, own].to(torch.bfloat16)  # [O, P / size]
    zero = torch.zeros_like(scale)
    if zero_points is not None:
        zero = ((INT4_MIDDLE - zero_points[:, own].float()) * scale.float()).to(torch.bfloat16)
    both = torch.stack((scale, zero), dim=-1).transpose(0, 1)
    packed = int4_pack(F.pad(codes, (0, columns - in_features, 0, rows)), tiles)
    return Int4Weight(packed, F.pad(both, (0, 0, 0, rows)).contiguous(), size, out_features)


def int4_pack(codes: torch.Tensor, tiles: int) -> torch.Tensor:
    """Codes `[O, P]` in the order of tensor cores; torch takes two a byte, the first in the high half."""
    return torch.ops.aten._convert_weight_to_int4pack((codes[:, 0::2] << 4) | codes[:, 1::2], tiles)


def int4_product(
    rows: torch.Tensor, packed: torch.Tensor, group_size: int, scales_and_zeros: torch.Tensor
) -> torch.Tensor:
    """Activations `[M, P]` times a weight that `int4_pack` made: bf16 `[M, O]`."""
    return torch.ops.aten._weight_int4pack_mm(rows, packed, group_size, scales_and_zeros)


class Int8Weight(NamedTuple):
    """Codes of 8 bits as they are stored, dequantized within every product, which `torch.compile` makes one.

    As in torchao and gpt-fast. Of torch's own operators `_weight_int8pack_mm` is on CUDA one thread an output, in fp32
    (ATen/native/cuda/int8mm.cu), and `_int_mm` rounds activations and knows no groups.
    """

    codes: torch.Tensor  # int8, with zero points uint8: [O, I]
    scales: torch.Tensor  # [O, G]
    zero_points: torch.Tensor | None  # [O, G]

    def linear(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x Wᵀ + bias` of activations `[M, I]`."""
        # bf16 holds codes exactly, but not what is left of one behind a zero point with a fraction.
        dtype = rows.dtype if self.zero_points is None else torch.float32
        weight, scales = self.codes.to(dtype), self.scales.to(dtype)
        if self.zero_points is None and scales.shape[1] == 1:
            output = F.linear(rows, weight) * scales.squeeze(1)
            return output if bias is None else output + bias
        weight = weight.unflatten(1, (scales.shape[1], -1))
        if self.zero_points is not None:
            weight = weight - self.zero_points.to(dtype).unsqueeze(-1)
        return F.linear(rows, (weight * scales.unsqueeze(-1)).flatten(1).to(rows.dtype), bias)


class TwoOfFourWeight(NamedTuple):
    """Two values of every four columns, for sparse tensor cores (Mishra et al. 2021, arXiv 2104.08378).

    torch's tensor for it multiplies through cuSPARSELt where torch is built with that, else through CUTLASS.
    """

    weight: torch.Tensor  # torch.sparse.SparseSemiStructuredTensor [O, I]

    def linear(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x Wᵀ + bias` of activations `[M, I]` in the weight's dtype."""
        return F.linear(rows.contiguous(), self.weight, bias)


def two_of_four_weight(weight: torch.Tensor) -> TwoOfFourWeight:
    """The layout of a dense weight `[O, I]`, bf16 or fp16, with its zeros in place."""
    kind = torch.sparse.SparseSemiStructuredTensorCUTLASS
    if torch.backends.cusparselt.is_available():
        kind = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    return TwoOfFourWeight(kind.from_dense(weight.detach().contiguous()))


CudaWeight = Int4Weight | Int8Weight | TwoOfFourWeight

__all__ = ["CudaWeight", "int4_weight", "layout_kind", "takes_layouts", "two_of_four_weight"]
