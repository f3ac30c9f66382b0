"""What the native kernels compute, in torch: the reference of their tests, and the reading of their arithmetic."""

import torch
from torch.nn import functional as F

SEGMENT = 32  # columns of the activations that share a scale


def round_activations(x: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """Activations `[M, I]` as the integer kernels see them: int8 in segments of 32 columns, scale max|x| / 127.

    A segment ends where a group of the weight's columns ends.
    """
    columns = x.shape[1]
    rounded = torch.empty_like(x, dtype=torch.float32)
    group = min(group_size or columns, columns)
    for group_begin in range(0, columns, group):
        group_end = min(group_begin + group, columns)
        for begin in range(group_begin, group_end, SEGMENT):
            part = x[:, begin : min(begin + SEGMENT, group_end)].float()
            largest = part.abs().amax(1, keepdim=True)
            inverse = torch.full_like(largest, 127) / largest  # `127 / largest` would be a product with the reciprocal
            codes = (part * torch.where(largest > 0, inverse, 0)).round()
            rounded[:, begin : begin + part.shape[1]] = codes * (largest / 127)
    return rounded


def linear(
    x: torch.Tensor, weight: torch.Tensor, bits: int, group_size: int | None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x Wᵀ + bias` of activations `[M, I]` and the dense fp32 weight `[O, I]` that a form of `bits` stands for.

    With integers the activations are rounded to int8, with bf16 weights to bf16, with fp32 weights not at all.
    """
    if bits < 16:
        x = round_activations(x, group_size)
    elif weight.dtype == torch.bfloat16:
        x = x.to(torch.bfloat16)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())
