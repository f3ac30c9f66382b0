"""Blocks of 32 integers as ggml packs them, from and to this family's codes, bit-equal.

A block begins with its scale d in fp16. Q8_0: `d * code`, 32 int8. Q4_0: `d * (code - 8)`; Q4_1: `d * code + m`, m in
fp16 after d; both with 16 bytes of codes 0..15, the first half of the block in the low halves of the bytes, the second
in the high ones. Layout: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.

Shapes: N rows, I in_features, B blocks of a row: I / 32.
"""

from dataclasses import dataclass

import torch

from ..model.configuration_llm_kernel import LinearForm

BLOCK = 32
# ggml's numbers of the types that are written, and what the command calls them.
F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
TYPES = {"F32": F32, "F16": F16, "BF16": BF16, "Q8_0": Q8_0, "Q4_0": Q4_0, "Q4_1": Q4_1}
NAMES = {number: name for name, number in TYPES.items()}
FLOATING = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
# The form of each type of integers, groups as wide as its blocks.
FORMS = {
    Q8_0: LinearForm(bits=8, group_size=BLOCK),
    Q4_0: LinearForm(bits=4, group_size=BLOCK),
    Q4_1: LinearForm(bits=4, group_size=BLOCK, symmetric=False, zero_point_dtype="float32"),
}


@dataclass(frozen=True)
class Blocks:
    """Codes `[N, I]` (int8 of Q8_0, else uint8), scales d and, of Q4_1, offsets m, fp16 `[N, B]`."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None


def row_bytes(kind: int, columns: int) -> int:
    """Bytes of a row of so many columns."""
    if kind in FLOATING:
        return columns * FLOATING[kind].itemsize
    return columns // BLOCK * {Q8_0: 34, Q4_0: 18, Q4_1: 20}[kind]


def pack_blocks(blocks: Blocks, kind: int) -> torch.Tensor:
    """uint8 `[N, row_bytes]` of blocks of a type of integers."""
    rows = len(blocks.codes)
    codes = blocks.codes.reshape(rows, -1, BLOCK)
    parts = [_bytes(blocks.scales)]
    if blocks.offsets is not None:
        parts.append(_bytes(blocks.offsets))
    if kind == Q8_0:
        parts.append(codes.view(torch.uint8))
    else:
        parts.append(codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4))
    return torch.cat(parts, -1).view(rows, -1)


def unpack_blocks(packed: torch.Tensor, kind: int) -> Blocks:
    """The inverse of `pack_blocks`."""
    rows = len(packed)
    blocks = packed.reshape(rows, -1, row_bytes(kind, BLOCK))
    scales, rest = _halves(blocks[..., :2]), blocks[..., 2:]
    if kind == Q8_0:
        return Blocks(rest.reshape(rows, -1).view(torch.int8), scales)
    offsets, rest = (_halves(rest[..., :2]), rest[..., 2:]) if kind == Q4_1 else (None, rest)
    return Blocks(torch.cat((rest & 15, rest >> 4), -1).view(rows, -1), scales, offsets)


def _bytes(halves: torch.Tensor) -> torch.Tensor:
    """uint8 `[N, B, 2]` of fp16 `[N, B]`."""
    return halves.contiguous().unsqueeze(-1).view(torch.uint8)


def _halves(two_bytes: torch.Tensor) -> torch.Tensor:
    """The inverse of `_bytes`."""
    return two_bytes.contiguous().view(torch.float16).squeeze(-1)


def lost_values(weight: torch.Tensor, blocks: Blocks) -> dict[str, int]:
    """How many values of a weight `[N, I]` are zero as fp16 has no scale so small, and how many have a subnormal one.

    Of a block whose values are all one, which has no scale, it is the offset that counts.
    """
    there = (weight != 0).view(len(weight), -1, BLOCK).sum(-1)  # [N, B]
    scales = blocks.scales.abs().float()
    if blocks.offsets is not None:
        scales = torch.where(scales == 0, blocks.offsets.abs().float(), scales)
    gone, small = scales == 0, (scales > 0) & (scales < torch.finfo(torch.float16).smallest_normal)
    return {"underflowed": int(there[gone].sum()), "subnormal": int(there[small].sum())}


def zero_points_of(blocks: Blocks) -> Blocks:
    """Blocks of Q4_1 with `offsets` the zero points fp32 `[N, B]` for which `d * (code - zero_point) = d * code + m`.

    A block with d = 0 is constant: it becomes `m * (0 - (-1))`.
    """
    assert blocks.offsets is not None
    constant = blocks.scales == 0
    scales = torch.where(constant, blocks.offsets, blocks.scales)
    safe = torch.where(scales == 0, 1, scales.float())
    zero_points = torch.where(constant, -1.0, -blocks.offsets.float() / safe)
    codes = blocks.codes.masked_fill(constant.repeat_interleave(BLOCK, 1), 0)
    return Blocks(codes, scales, zero_points)


def of_codes(codes: torch.Tensor, form: LinearForm, scales: torch.Tensor, zero_points: torch.Tensor | None) -> Blocks:
    """Blocks of the codes `[N, I]` of an integer form, the scale of a wider group repeated.

    Args:
        codes: as `dense_codes` gives them.
        form: theirs, its groups whole blocks.
        scales, zero_points: `[N, G]`; offsets `-zero_point * scale` are rounded to fp16.
    """
    columns = codes.shape[1]
    wide = torch.arange(0, columns, BLOCK) // (form.group_size or columns)  # the group of every block
    exact = scales.float()
    offsets = None if zero_points is None else (-zero_points.float() * exact).half()[:, wide]
    return Blocks(codes, scales.half()[:, wide], offsets)
