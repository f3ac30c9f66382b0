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
"""The forms of a linear: what is stored, how it becomes a dense weight again, and the modules that hold it.

Reading order: bits and nibbles -> integers in groups -> a weight packed and unpacked -> modules -> the factory.

Shapes: O out_features, I in_features, K kept values of a row, G groups of columns, N rows asked for, R rank.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .configuration_llm_kernel import LinearForm
from .cuda_llm_kernel import (
    INT4_ROWS,
    CudaWeight,
    Int4Weight,
    Int8Weight,
    int4_weight,
    layout_kind,
    takes_layouts,
    two_of_four_weight,
)

logger = logging.get_logger(__name__)

try:  # where the package is installed with its native library
    from hf_llmkernel.kernels.dispatch import native_kernels

    KERNELS = native_kernels(interface=2)
except ImportError:
    KERNELS = None


def kernels_in_use():
    """The native kernels where they serve, else `None`: what is traced has of them what was kept before, no more."""
    return None if KERNELS is None or torch.compiler.is_compiling() or not KERNELS.is_enabled() else KERNELS


INT4_OFFSET = 8  # symmetric 4-bit integers -8..7 are stored as 0..15


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Bits of a boolean mask `[O, I]`, eight columns a byte, the first in the lowest bit: uint8 `[O, ceil(I / 8)]`."""
    padded = F.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(mask.shape[0], -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """The inverse of `pack_mask`: bool `[N, I]` from uint8 `[N, ceil(I / 8)]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1  # [N, bytes, 8]
    return bits.flatten(1)[:, :in_features].bool()


def population(packed: torch.Tensor) -> torch.Tensor:
    """How many bits of every byte are set: uint8 like `packed`."""
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes (0..15) a byte, the first in the low half: uint8 `[..., ceil(K / 2)]` from `[..., K]`."""
    padded = F.pad(codes.to(torch.uint8), (0, codes.shape[-1] % 2))
    return padded[..., 0::2] | (padded[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 `[..., count]`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :count]


def group_range(weight: torch.Tensor, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of every group of columns, zero included: two fp32 `[O, G]` from `[O, I]`."""
    group = min(group_size or weight.shape[1], weight.shape[1])
    padded = F.pad(weight.float(), (0, -weight.shape[1] % group))  # a short last group gains zeros, always in range
    groups = padded.view(weight.shape[0], -1, group)
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def expand_groups(grouped: torch.Tensor, in_features: int, group_size: int | None) -> torch.Tensor:
    """One entry a column from one a group: fp32 `[N, I]` from `[N, G]`."""
    group = min(group_size or in_features, in_features)
    return grouped.float().repeat_interleave(group, dim=1)[:, :in_features]


def round_to_nearest(weight: torch.Tensor, form: LinearForm) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points that span every group's range, in the dtypes of the form.

    Args:
        weight: `[O, I]`.
        form: integer form; symmetric takes `max|w| / (2^(bits-1) - 1)`, else `(max - min) / (2^bits - 1)`.

    Returns:
        scales `[O, G]`, and zero points `[O, G]` or `None` where symmetric.

    Raises:
        ValueError: a range above what the scale's dtype can hold.
    """
    low, high = group_range(weight, form.group_size)
    levels = 2 ** (form.bits - 1) - 1 if form.symmetric else 2**form.bits - 1
    exact = (torch.maximum(-low, high) if form.symmetric else high - low) / levels
    dtype = getattr(torch, form.scale_dtype)
    # A scale below the dtype's smallest number takes that number: still the nearest grid there is.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    scales = torch.where(exact > 0, exact.clamp(min=smallest), 0).to(dtype)
    if not scales.isfinite().all():
        raise ValueError(
            f"scale_dtype={form.scale_dtype!r}: cannot hold a scale of {exact.max():.3g}; set scale_dtype to "
            "'bfloat16' or 'float32', and look for weights that are not finite."
        )
    if form.symmetric:
        return scales, None
    zero_points = -low / torch.where(scales == 0, 1, scales.float())
    if form.zero_point_dtype == "uint8":
        zero_points = zero_points.round().clamp(0, levels)
    return scales, zero_points.to(getattr(torch, form.zero_point_dtype))


def quantize(
    weight: torch.Tensor, form: LinearForm, scales: torch.Tensor, zero_points: torch.Tensor | None
) -> torch.Tensor:
    """Integer codes `[O, I]` nearest to a weight: int8 where 8-bit symmetric, else uint8."""
    scale = expand_groups(scales, weight.shape[1], form.group_size)
    codes = weight.float() / torch.where(scale == 0, 1, scale)
    if zero_points is not None:
        codes = codes + expand_groups(zero_points, weight.shape[1], form.group_size)
        return codes.round().clamp(0, 2**form.bits - 1).to(torch.uint8)
    if form.bits == 8:
        return codes.round().clamp(-127, 127).to(torch.int8)
    return (codes.round().clamp(-8, 7) + INT4_OFFSET).to(torch.uint8)


def dequantize(
    codes: torch.Tensor, form: LinearForm, scales: torch.Tensor, zero_points: torch.Tensor | None
) -> torch.Tensor:
    """The fp32 weight `[N, I]` of integer codes `[N, I]`: `(code - zero_point) * scale`."""
    values = codes.float()
    if zero_points is not None:
        values = values - expand_groups(zero_points, codes.shape[1], form.group_size)
    elif form.bits == 4:
        values = values - INT4_OFFSET
    return values * expand_groups(scales, codes.shape[1], form.group_size)


def largest_mask(weight: torch.Tensor, form: LinearForm) -> torch.Tensor:
    """The positions `[O, I]` of the largest magnitudes that a sparse form has room for; ties keep the first."""
    magnitude = weight.abs().float()
    if form.sparsity == "bitmask":
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[magnitude.flatten().argsort(descending=True, stable=True)[: form.nnz]] = True
        return mask.view(weight.shape)
    kept, group = form.kept_of_group()
    # Columns that pad a short last group rank below every real one.
    padded = F.pad(magnitude, (0, -weight.shape[1] % group), value=-1.0).view(weight.shape[0], -1, group)
    rank = padded.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < kept).flatten(1)[:, : weight.shape[1]]


def nonzero_mask(weight: torch.Tensor, form: LinearForm) -> torch.Tensor:
    """The nonzeros `[O, I]` of a weight, and as many of its zeros as the form has room for.

    Raises:
        ValueError: more nonzeros than the form keeps.
    """
    mask = weight != 0
    if form.sparsity != "bitmask" or int(mask.sum()) != form.nnz:
        mask = largest_mask(weight, form)
    if lost := int((weight.ne(0) & ~mask).sum()):
        raise ValueError(f"sparsity={form.sparsity!r}: the weight has {lost} nonzeros too many; zero them first.")
    return mask


def check_mask(packed: torch.Tensor, form: LinearForm, in_features: int) -> None:
    """Raises `ValueError` where a mask keeps other counts than its form: the values could not be told apart."""
    stray = int(population(packed[:, -1] >> (in_features % 8)).sum()) if in_features % 8 else 0
    if stray:
        raise ValueError(f"mask: {stray} bits lie beyond column {in_features}; the file is damaged, write it again.")
    if form.sparsity == "bitmask":
        if (kept := int(population(packed).sum())) != form.nnz:
            raise ValueError(
                f"mask: population {kept} is not the value count nnz={form.nnz}; the file is damaged or its "
                "config is another's: write it again."
            )
        return
    kept, group = form.kept_of_group()
    mask = unpack_mask(packed, in_features)
    counts = F.pad(mask, (0, -in_features % group)).view(mask.shape[0], -1, group).sum(-1)
    expected = torch.full_like(counts[0], kept)
    expected[-1] = min(kept, in_features % group or group)
    if wrong := int((counts != expected).sum()):
        raise ValueError(f"mask: {wrong} groups do not keep {form.sparsity}; the file is damaged: write it again.")


def pack_weight(
    weight: torch.Tensor,
    form: LinearForm,
    mask: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight in a packed form (bias apart), as `LinearForm.stored_tensors` names them.

    Args:
        weight: `[O, I]`; where `scales` are given, already on their grid or to be rounded onto it.
        form: a packed form, one linear (of a low rank, a factor).
        mask: bool `[O, I]`, the positions kept; by default the nonzeros.
        scales, zero_points: `[O, G]`; by default those of `round_to_nearest`.

    Raises:
        ValueError: more nonzeros than the form keeps, or a range its scales cannot hold.
    """
    stored = {}
    values = weight
    if form.sparsity is not None:
        mask = nonzero_mask(weight, form) if mask is None else mask
        stored["mask"] = pack_mask(mask)
        check_mask(stored["mask"], form, weight.shape[1])
    if form.bits < 16:
        if scales is None:
            scales, zero_points = round_to_nearest(weight, form)
        stored["scales"] = scales.to(getattr(torch, form.scale_dtype))
        if zero_points is not None:
            stored["zero_points"] = zero_points.to(getattr(torch, form.zero_point_dtype))
        values = quantize(weight, form, stored["scales"], stored.get("zero_points"))
    if mask is not None:
        values = values[mask].view(form.values_shape(*weight.shape))
    stored["values"] = pack_nibbles(values) if form.bits == 4 else values.contiguous()
    return stored


def row_starts(packed_mask: torch.Tensor) -> torch.Tensor:
    """Where the values of each row of a bitmask begin: int64 `[O]` from uint8 `[O, ceil(I / 8)]`."""
    bits = torch.arange(256, device=packed_mask.device)
    population = torch.stack([(bits >> shift) & 1 for shift in range(8)]).sum(0)  # of every byte
    ends = population[packed_mask.long()].sum(-1).cumsum(0)
    return F.pad(ends, (1, 0))[:-1]


def unpack_rows(
    stored: Mapping[str, torch.Tensor],
    form: LinearForm,
    in_features: int,
    dtype: torch.dtype,
    rows: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense rows of a packed weight.

    Args:
        stored: the tensors of `pack_weight`.
        form: their form.
        in_features: I.
        dtype: of the result where the values are integers; floating values keep their own.
        rows: int `[N]`; by default all O rows.
        starts: `row_starts` of the mask, where rows of a bitmask are asked for again and again.

    Returns:
        `[N, I]`, exactly zero where the form keeps nothing.
    """
    selected = {name: tensor if rows is None else tensor[rows] for name, tensor in stored.items() if name != "values"}
    mask = unpack_mask(selected["mask"], in_features) if "mask" in selected else None
    if form.sparsity == "bitmask" and rows is not None:
        starts = row_starts(stored["mask"]) if starts is None else starts
        values = _gather_values(stored["values"], form, mask, starts[rows])
    else:
        values = _spread_values(stored["values"], form, in_features, rows, mask)
    if form.bits == 16:
        return values
    values = dequantize(values, form, selected["scales"], selected.get("zero_points"))
    return (values if mask is None else values.masked_fill(~mask, 0)).to(dtype)


def _spread_values(
    values: torch.Tensor, form: LinearForm, in_features: int, rows: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """Values or codes at their dense positions `[N, I]`, zero where nothing is kept."""
    values = values if rows is None else values[rows]
    if form.bits == 4:
        values = unpack_nibbles(values, form.values_shape(1, in_features)[-1])
    return values if mask is None else values.new_zeros(mask.shape).masked_scatter(mask, values)


def _gather_values(values: torch.Tensor, form: LinearForm, mask: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Values or codes `[N, I]` of chosen rows of a bitmask, each row's beginning at `starts` `[N]`."""
    position = (starts.unsqueeze(-1) + mask.cumsum(-1) - 1).clamp(min=0)  # [N, I]
    if not values.numel():
        return values.new_zeros(mask.shape)
    if form.bits == 4:
        found = (values[position // 2] >> (4 * (position % 2)).to(torch.uint8)) & 15
    else:
        found = values[position.clamp(max=values.numel() - 1)]
    return found.masked_fill(~mask, 0)


def unpack_codes(stored: Mapping[str, torch.Tensor], form: LinearForm, in_features: int) -> torch.Tensor:
    """The 4-bit codes `[O, I]` of a packed weight, uint8; of a symmetric sparse one 8, which is zero, between those."""
    mask = unpack_mask(stored["mask"], in_features) if "mask" in stored else None
    codes = _spread_values(stored["values"], form, in_features, None, mask)
    return codes if mask is None else torch.where(mask, codes, INT4_OFFSET)


def unpack_weight(stored: Mapping[str, torch.Tensor], form: LinearForm, in_features: int, dtype: torch.dtype):
    """The dense weight `[O, I]` of a packed or low-rank linear from its stored tensors, bias apart."""
    if form.rank is not None:
        a, b = form.factors
        first = {name[2:]: tensor for name, tensor in stored.items() if name.startswith("a.")}
        second = {name[2:]: tensor for name, tensor in stored.items() if name.startswith("b.")}
        return unpack_weight(second, b, form.rank, dtype) @ unpack_weight(first, a, in_features, dtype)
    if form.is_dense:
        return stored["weight"]
    return unpack_rows({name: tensor for name, tensor in stored.items() if name != "bias"}, form, in_features, dtype)


class DerivedWeight(torch.Tensor):
    """The dense weight of a compressed linear, to look at: an edit in place would be lost, so it raises.

    Adapters read `weight` for shape, dtype and device; merging one writes into it.
    """

    remedy = "keep the adapter apart, or merge it into the dense checkpoint and compress that"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        in_place = name.startswith("__i") if name.startswith("__") else name.endswith("_")
        if name == "__set__" or (in_place and name not in ("__index__", "__int__", "__invert__")):
            raise ValueError(
                f"weight: this linear is stored compressed and an edit in place would be lost; {cls.remedy}."
            )
        return super().__torch_function__(func, types, args, kwargs or {})


class DerivedProduct(DerivedWeight):
    """The dense weight of a low-rank linear."""

    remedy = (
        "it is low-rank: keep the adapter apart, or attach one that is to be merged to its two factors, as in "
        "target_modules=['q_proj.a', 'q_proj.b']"
    )


class PackedWeight(nn.Module):
    """A weight `[O, I]` stored sparse, integer, or both.

    Integer payloads are parameters without gradient, so that offload, sharding and device maps see them; scales and
    zero points are buffers that keep their dtype whatever the model is cast to.
    """

    def __init__(self, in_features: int, out_features: int, form: LinearForm):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.form = form
        self.compute_dtype = torch.get_default_dtype()  # of the activations, where no stored value tells
        self._derived = None
        for name, (shape, dtype) in form.stored_tensors(out_features, in_features).items():
            self._register(name, shape, dtype)
        if not form.bias:
            self.register_parameter("bias", None)

    def _register(self, name: str, shape: tuple[int, ...], dtype: str | None) -> None:
        tensor = torch.empty(shape, dtype=self.compute_dtype if dtype is None else getattr(torch, dtype))
        if name in ("scales", "zero_points"):
            self.register_buffer(name, tensor)
        else:
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=dtype is None))

    def stored(self) -> dict[str, torch.Tensor]:
        """The stored tensors of the weight by name, bias apart."""
        names = ("values", "mask", "scales", "zero_points")
        return {name: getattr(self, name) for name in names if getattr(self, name, None) is not None}

    def dense_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight `[O, I]`; kept between calls in evaluation, unless a layout of the weight is kept."""
        dtype = dtype or self.compute_dtype
        key = None if self._derived is None else self._derived[1]
        if isinstance(key, tuple) or (key == "kernels" and kernels_in_use() is not None):
            return unpack_rows(self.stored(), self.form, self.in_features, dtype)
        return self._derive(dtype, lambda: unpack_rows(self.stored(), self.form, self.in_features, dtype))

    def kernel_layout(self):
        """The weight as native kernels read it, kept between calls in evaluation; `None` where they cannot."""
        kernels = kernels_in_use()
        if kernels is None or self.values.device.type != "cpu" or not self._may_keep():
            return None
        shape = (self.out_features, self.in_features)
        return self._derive("kernels", lambda: kernels.layout(self.stored(), self.form, *shape))

    def kept_tensor(self) -> torch.Tensor | None:
        """What a CPU keeps between calls beside the stored tensors: the dense weight, or the bytes of a layout."""
        return None if self._derived is None else getattr(self._derived[2], "data", None)

    @property
    def weight(self) -> DerivedWeight:
        """The dense weight `[O, I]`, read-only."""
        return self.dense_weight().detach().as_subclass(DerivedWeight)

    def _kept(self, key: object) -> torch.Tensor | CudaWeight | None:
        """What is kept under a key, to a graph that is being compiled; an exported one holds stored tensors alone."""
        needs_gradient = torch.is_grad_enabled() and self.values.requires_grad
        if self._derived is None or needs_gradient or torch.compiler.is_exporting():
            return None
        return self._derived[2] if self._derived[1] == key else None

    def _derive(self, key: object, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What is computed from the stored tensors, kept until one of them, or the key, is another."""
        if torch.compiler.is_compiling():
            kept = self._kept(key)
            return compute() if kept is None else kept
        if not self._may_keep():
            return compute()
        versions = [(tensor, tensor._version) for tensor in self.stored().values()]
        if self._derived is None or not _same_versions(self._derived, (versions, key)):
            # A tensor made in inference mode could not serve a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._derived = (versions, key, compute())
        return self._derived[2]

    def _may_keep(self) -> bool:
        values = self.values
        needs_gradient = torch.is_grad_enabled() and values.requires_grad
        # The tensors of one that is offloaded, or paged, come and go with every call.
        offloaded = hasattr(self, "_hf_hook") or hasattr(self, "_paging")
        stable = not (self.training or needs_gradient or offloaded)
        return stable and type(values.data) is torch.Tensor and not values.is_inference()

    def check_stored(self, name: str) -> None:
        """Raises `ValueError`, with the module's `name`, where the stored mask contradicts the form."""
        mask = self.stored().get("mask")
        try:
            if mask is not None and is_whole(mask):
                check_mask(mask, self.form, self.in_features)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None

    def train(self, mode: bool = True):
        self._derived = None
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs):
        self._derived = None  # a compiled graph does not look at versions
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        exact = {name: tensor for name, tensor in self.stored().items() if name in ("scales", "zero_points")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        self._derived = None
        return self

    def __getstate__(self):
        return {**self.__dict__, "_derived": None}

    def extra_repr(self) -> str:
        form = ", ".join(f"{name}={value}" for name, value in self.form.to_dict().items() if name != "version")
        return f"in_features={self.in_features}, out_features={self.out_features}, {form}"


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether all of a tensor is here: not one on the meta device, not one rank's part of a sharded one."""
    return tensor.device.type != "meta" and type(tensor.data) is torch.Tensor


def _same_versions(derived: tuple, wanted: tuple) -> bool:
    (known, known_key, _), (versions, key) = derived, wanted
    return known_key == key and all(a is b and i == j for (a, i), (b, j) in zip(known, versions, strict=True))


class PackedLinear(PackedWeight, nn.Linear):
    """A linear `y = x Wᵀ + bias` over a packed weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if (layout := self._native_layout(input)) is not None:
            return KERNELS.linear(input, layout, self.bias)
        needs_backward = input.requires_grad and torch.is_grad_enabled()  # which products on CUDA do not have
        if not needs_backward and (weight := self.cuda_layout(input.dtype)) is not None:
            return self._multiply(input, weight)
        return F.linear(input, self.dense_weight(input.dtype), self.bias)

    def _native_layout(self, input: torch.Tensor):
        """The weight as native kernels read it, where they take the product; `None` to torch's own operations.

        A graph that is compiled has it where it was there before, an exported one never: it may run anywhere.
        """
        if torch.compiler.is_compiling():
            layout = self._kept("kernels")
            return layout if layout is not None and KERNELS.serves(input) else None
        kernels = kernels_in_use()
        layout = self.kernel_layout() if kernels is not None and kernels.serves(input) else None
        return layout if layout is not None and kernels.takes(input, layout) else None

    def cuda_layout(self, dtype: torch.dtype) -> CudaWeight | None:
        """The weight as torch's products on CUDA read it, kept between calls in evaluation; `None` where none does.

        A graph that is compiled has it where it was there before: see `LLMKernelPreTrainedModel.get_compiled_call`.
        """
        key = ("cuda", dtype)
        if torch.compiler.is_compiling():
            return self._kept(key)
        device = self.values.device
        if not self._may_keep():
            return None
        kind = layout_kind(self.form, self.out_features, self.in_features, dtype) if takes_layouts(device) else None
        if kind is not None:
            return self._derive(key, lambda: self._make_cuda_layout(kind, dtype))
        if device.type != "cpu":
            logger.warning_once(
                f"packed linears that have no product of their own on {device.type} are kept and multiplied dense; "
                "`llmkernel export MODEL OUTPUT --to compressed-tensors` writes int4 and int8 for vLLM."
            )
        return None

    def _make_cuda_layout(self, kind: str, dtype: torch.dtype) -> CudaWeight:
        stored = self.stored()
        if kind == "2:4":
            return two_of_four_weight(unpack_rows(stored, self.form, self.in_features, dtype))
        if kind == "int8":
            return Int8Weight(self.values.detach(), self.scales, stored.get("zero_points"))
        codes = unpack_codes(stored, self.form, self.in_features)
        return int4_weight(codes, self.form, self.scales, stored.get("zero_points"))

    def prepare(self) -> None:
        """Keeps what a graph that is compiled after this computes with."""
        self.kernel_layout()
        if takes_layouts(self.values.device) and self.cuda_layout(self.compute_dtype) is None:
            self.dense_weight()

    def _multiply(self, input: torch.Tensor, weight: CudaWeight) -> torch.Tensor:
        rows = input.reshape(-1, self.in_features)
        if isinstance(weight, Int4Weight) and rows.shape[0] > INT4_ROWS:
            return F.linear(input, self.dense_weight(input.dtype), self.bias)
        return weight.linear(rows, self.bias).view(*input.shape[:-1], self.out_features)


class PackedEmbedding(PackedWeight):
    """A lookup of the rows of a packed weight `[vocab_size, hidden_size]`."""

    init_scheme = "normal"  # as of a dense embedding, whatever the linears' is

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        stored = self.stored()
        bitmask = self.form.sparsity == "bitmask"
        starts = self._derive("starts", lambda: row_starts(self.mask)) if bitmask else None
        rows = unpack_rows(stored, self.form, self.in_features, self.compute_dtype, input.flatten(), starts)
        return rows.view(*input.shape, self.in_features)


class LowRankLinear(nn.Linear):
    """`y = b(a(x))`: a linear of weight `B A`, its two factors linears of their own form."""

    def __init__(self, in_features: int, out_features: int, form: LinearForm):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.form = form
        a, b = form.factors
        self.a = build_linear(in_features, form.rank, a)
        self.b = build_linear(form.rank, out_features, b)
        self.a.factor_of = self.b.factor_of = (out_features, in_features, form.rank)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.b.bias

    @property
    def weight(self) -> DerivedProduct:
        """The dense weight `[O, I]`, read-only."""
        a, b = decoded_weight(self.a), decoded_weight(self.b)
        return (b @ a.to(b.dtype)).detach().as_subclass(DerivedProduct)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(input))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.form.rank}"


class LowRankEmbedding(nn.Module):
    """A lookup in `B A`, B `[vocab_size, R]` and A `[R, hidden_size]`, stored as a tied `LowRankLinear` stores them."""

    def __init__(self, num_embeddings: int, embedding_dim: int, form: LinearForm):
        super().__init__()
        self.form = form
        a, b = form.factors
        self.a = build_linear(embedding_dim, form.rank, a)
        self.b = build_embedding(num_embeddings, form.rank, b)
        self.a.factor_of = self.b.factor_of = (num_embeddings, embedding_dim, form.rank)
        self.a.init_scheme = self.b.init_scheme = PackedEmbedding.init_scheme

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = self.b(input)  # [..., R]
        factor = self.a.dense_weight(rows.dtype) if isinstance(self.a, PackedWeight) else self.a.weight
        return rows @ factor


def decoded_weight(linear: nn.Linear) -> torch.Tensor:
    """The dense weight of a linear, also where bitsandbytes keeps codes of it."""
    if type(linear.weight).__name__ not in ("Params4bit", "Int8Params"):
        return linear.weight
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(linear.weight, getattr(linear, "state", None))


def build_linear(in_features: int, out_features: int, form: LinearForm) -> nn.Linear:
    """The one factory of linears: an exact `nn.Linear` where dense, so that every tool that looks for one finds it."""
    if form.rank is not None:
        return LowRankLinear(in_features, out_features, form)
    if form.is_packed:
        return PackedLinear(in_features, out_features, form)
    return nn.Linear(in_features, out_features, bias=bool(form.bias))


def build_embedding(
    num_embeddings: int, embedding_dim: int, form: LinearForm, padding_idx: int | None = None
) -> nn.Module:
    """The one factory of embeddings; stored as `build_linear(embedding_dim, num_embeddings, form)` stores."""
    if form.rank is not None:
        return LowRankEmbedding(num_embeddings, embedding_dim, form)
    if form.is_packed:
        return PackedEmbedding(embedding_dim, num_embeddings, form)
    return nn.Embedding(num_embeddings, embedding_dim, padding_idx)


__all__ = ["LinearForm", "LowRankLinear", "PackedLinear", "PackedWeight", "build_embedding", "build_linear"]
