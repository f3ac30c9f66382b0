"""torch's operators for packed weights on CUDA, emulated on the CPU under their own names.

Each follows its CUDA source value by value: the order of tiles in `aten/src/ATen/native/cuda/int4mm.cu`, and for 2:4
torch's own conversion to CUTLASS's format. An order that these do not know would give other numbers.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.sparse import SparseSemiStructuredTensorCUTLASS as CUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from hf_llmkernel.model import linear_llm_kernel
from hf_llmkernel.model.cuda_llm_kernel import takes_layouts
from hf_llmkernel.model.linear_llm_kernel import PackedWeight

NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # which of a thread's eight codes lie in an int32, from the lowest bits on


def tile_places(rows: int, columns: int, tiles: int):
    """For every int32 of the packed weight: its place, its row, and the columns of its eight codes."""
    for row_tile in range(rows // 8):
        for outer in range(columns // (tiles * 16)):
            for thread in range(32):
                for inner in range(0, tiles, 2):
                    base = (outer * tiles + inner) * 8 + thread % 4  # in bytes of two codes
                    pairs = (base, base + 4, base + 8, base + 12)
                    place = (row_tile, outer, thread, inner // 2)
                    yield place, row_tile * 8 + thread // 4, [2 * pair + half for pair in pairs for half in (0, 1)]


def convert_to_int4pack(codes: torch.Tensor, tiles: int) -> torch.Tensor:
    assert codes.dtype == torch.uint8 and codes.is_contiguous() and codes.shape[0] % 8 == 0
    assert codes.shape[1] * 2 % (tiles * 16) == 0
    plain = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(1).tolist()  # the first of a byte in the high half
    rows, columns = len(plain), len(plain[0])
    packed = torch.zeros(rows // 8, columns // (tiles * 16), 32, tiles // 2, dtype=torch.int64)
    for place, row, found in tile_places(rows, columns, tiles):
        packed[place] = sum(plain[row][found[code]] << (4 * bits) for bits, code in enumerate(NIBBLES))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def int4pack_mm(x: torch.Tensor, packed: torch.Tensor, group: int, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    tiles = packed.shape[3] * 2
    rows, columns = packed.shape[0] * 8, packed.shape[1] * tiles * 16
    assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] == columns
    assert group in (32, 64, 128, 256) and columns % group == 0
    assert scales_and_zeros.dtype == torch.bfloat16 and scales_and_zeros.is_contiguous()
    assert scales_and_zeros.shape == (columns // group, rows, 2)
    codes = torch.zeros(rows, columns)
    words = packed.tolist()
    for (row_tile, outer, thread, inner), row, found in tile_places(rows, columns, tiles):
        for bits, code in enumerate(NIBBLES):
            codes[row, found[code]] = (words[row_tile][outer][thread][inner] >> (4 * bits)) & 15
    scale, zero = (part.t().repeat_interleave(group, 1).float() for part in scales_and_zeros.unbind(-1))
    weight = ((codes - 8) * scale + zero).to(torch.bfloat16)  # one rounding, as of a fused multiply and add
    return (x.float() @ weight.float().t()).to(torch.bfloat16)


def sparse_mm(packed: torch.Tensor, meta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    assert x.dtype == packed.dtype
    return sparse_semi_structured_to_dense_cutlass(packed, meta) @ x


def sparse_addmm(bias: torch.Tensor, packed: torch.Tensor, meta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return sparse_mm(packed, meta, x) + bias.unsqueeze(1)


EMULATED = {
    "_convert_weight_to_int4pack": convert_to_int4pack,
    "_weight_int4pack_mm": int4pack_mm,
    "_sparse_semi_structured_mm": sparse_mm,
    "_sparse_semi_structured_addmm": sparse_addmm,
}


@contextmanager
def pretended_cuda():
    """The CPU takes the layouts of CUDA, through the operators above."""
    check = CUTLASS._validate_device_dim_dtype_shape.__func__

    def check_shape(kind, tensor):
        with mock.patch.object(torch.Tensor, "is_cuda", True):
            check(kind, tensor)

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, emulated in EMULATED.items():
            library.impl(name, emulated, "CPU")
        with (
            mock.patch.object(linear_llm_kernel, "takes_layouts", lambda device: True),
            mock.patch.object(CUTLASS, "_validate_device_dim_dtype_shape", classmethod(check_shape)),
        ):
            yield


class PythonIndexing(TorchFunctionMode):
    """Some methods by operators: torch built without CUDA refuses its own for tensors that pretend to be there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        methods = {
            torch.Tensor.__getitem__: indexed,
            torch.Tensor.__invert__: torch.bitwise_not,
            torch.Tensor.contiguous: torch.ops.aten.contiguous.default,
        }
        return methods.get(function, function)(*args, **(kwargs or {}))


def indexed(tensor: torch.Tensor, index) -> torch.Tensor:
    """`tensor[index]` of numbers, slices, `None`, `...`, and tensors without any of these before them."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        place = next(place for place, part in enumerate(parts) if part is Ellipsis)
        whole = tensor.dim() - sum(part is not None and part is not Ellipsis for part in parts)
        parts[place : place + 1] = [slice(None)] * whole
    chosen, dim = [], 0
    for part in parts:
        if isinstance(part, int):
            tensor = torch.select(tensor, dim, part)
        elif part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
        if not isinstance(part, int):
            chosen.append(part if isinstance(part, torch.Tensor) else None)
            dim += 1
    return torch.ops.aten.index.Tensor(tensor, chosen) if any(part is not None for part in chosen) else tensor


@contextmanager
def fake_cuda(*modules: nn.Module):
    """Modules on a GPU that has shapes and no values."""
    takes_layouts.cache_clear()
    with (
        FakeTensorMode(),
        PythonIndexing(),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (8, 0)),
        mock.patch.object(PackedWeight, "_may_keep", lambda self: True),  # else not of another kind of tensor
    ):
        for module in modules:
            for part in module.modules():
                for kept in (part._parameters, part._buffers):
                    kept.update({name: on_gpu(tensor) for name, tensor in kept.items() if tensor is not None})
        yield
    takes_layouts.cache_clear()


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
