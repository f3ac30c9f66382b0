"""Columns of a weight scaled, and whatever their inputs come from divided by as much.

AWQ (Lin et al. 2024, arXiv 2306.00978) scales salient columns up, so that they round finer: by `s_j = m_j^α`, m the
mean magnitude of the input. SmoothQuant (Xiao et al. 2023, arXiv 2211.10438) scales inputs that have outliers down, so
that they could be int8 themselves: by `s_j = max|X_j|^½ / max|W_j|^½`.

Inputs of q, k, v, gate and up come from a norm; those of down_proj from the rows of up_proj; those of o_proj from
v_proj's, where heads that share one value head share its factors. Divided rows of integers are divided scales.

Reading order: which factors -> where inputs come from -> the fold.

Shapes: O out_features, I in_features.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ..block import SUBLAYER_MODULES, Block, matrix_names
from .grid import grid_of

EXPONENTS = tuple(step / 20 for step in range(20))
NORMS = {"attention_input": SUBLAYER_MODULES["attention"][1], "mlp_input": SUBLAYER_MODULES["mlp"][1]}


class Factors(NamedTuple):
    """Factors fp32 `[I]` of columns, the exponent they come of, and the loss with them as a share of that without.

    AWQ's loss is what rounding the weight costs, SmoothQuant's what rounding the inputs to int8 would.
    """

    factors: torch.Tensor
    exponent: float
    loss: float


def awq_factors(
    weight: torch.Tensor,
    magnitude: torch.Tensor,
    form: LinearForm,
    charge: Callable[[torch.Tensor], torch.Tensor],
    importance: torch.Tensor | None = None,
) -> Factors:
    """The factors whose exponent α loses least when the scaled weight is rounded to nearest (section 3.2).

    Args:
        weight: `[O, I]`, of all matrices that take the inputs.
        magnitude: m, `[I]`.
        form: an integer form.
        charge: what errors `[O, I]` of the unscaled weight cost.
        importance: of squared errors of the unscaled weight, for a search of the scales; by default the whole range is
            taken.
    """
    losses = []
    for exponent in EXPONENTS:
        factors = _factors(magnitude, exponent)
        scaled = weight * factors
        grid = grid_of(scaled, form, None if importance is None else importance / factors.square())
        losses.append(float(charge(weight - grid.nearest(scaled) / factors)))
    best = min(range(len(losses)), key=losses.__getitem__)
    exponent = EXPONENTS[best]
    return Factors(_factors(magnitude, exponent), exponent, losses[best] / losses[0] if losses[0] else 1.0)


def _factors(magnitude: torch.Tensor, exponent: float) -> torch.Tensor:
    """`m^α`, scaled so that the largest and the smallest are as far from one."""
    factors = magnitude.float().pow(exponent).clamp(min=1e-4)
    return factors / (factors.max() * factors.min()).sqrt()


def smooth_factors(weight: torch.Tensor, largest: torch.Tensor) -> Factors:
    """`max|X_j|^½ / max|W_j|^½` (section 4), which makes the columns' ranges as hard to round as the inputs'.

    Args:
        weight: `[O, I]`, of all matrices that take the inputs.
        largest: `max|X_j|`, `[I]`.
    """
    factors = largest.float().clamp(min=1e-5).sqrt() / weight.abs().amax(0).clamp(min=1e-5).sqrt()
    before = activation_loss(weight, largest)
    after = activation_loss(weight * factors, largest / factors)
    return Factors(factors, 0.5, after / before if before else 1.0)


def activation_loss(weight: torch.Tensor, largest: torch.Tensor) -> float:
    """Expected squared error of the outputs of a token whose inputs are int8, one scale for all of them.

    A step is `max|X| / 127`, and an input is off by `step² / 12` on average: `step² / 12 · ‖W‖²`.
    """
    step = float(largest.max()) / 127
    return step**2 / 12 * float(weight.double().square().sum())


def takers(layer: LLMKernelConfig, site: str) -> list[str]:
    """The matrices that take the inputs of a site: of a low rank its first factor."""
    return [name for name in matrix_names(layer, site) if not name.endswith(".b")]


def can_fold(layer: LLMKernelConfig, site: str) -> bool:
    """Whether what a site's inputs come from can be scaled: a feed-forward that is not gated ends in its activation."""
    return site != "mlp_output" or layer.mlp_gated


def _heads(layer: LLMKernelConfig) -> tuple[int, int, int]:
    """Value heads, heads that share each of them, and features of a head."""
    shared, size = layer.num_key_value_heads, layer.head_dim
    assert shared is not None and size is not None, "a layer's own configuration has both"
    return shared, layer.num_attention_heads // shared, size


def shared_by_heads(
    layer: LLMKernelConfig, site: str, sizes: torch.Tensor, join: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Sizes `[I]` of a site's inputs, those that come from one output of v_proj joined, by `torch.mean` or `amax`."""
    if site != "attention_output":
        return sizes
    heads = sizes.view(*_heads(layer))
    return join(heads, 1, keepdim=True).expand_as(heads).reshape(-1)


def fold(block: Block, site: str, factors: torch.Tensor) -> None:
    """Multiplies the columns of a site's matrices by factors `[I]`, and divides what their inputs come from."""
    for name in takers(block.layer, site):
        block.scale_inputs(name, factors)
    if site in NORMS:
        block.tensors[f"{NORMS[site]}.weight"] = block.tensors[f"{NORMS[site]}.weight"] / factors
    elif site == "mlp_output":
        block.scale_outputs("up_proj", 1 / factors)
    else:
        heads = factors.view(*_heads(block.layer))
        block.scale_outputs("v_proj", 1 / heads[:, 0].reshape(-1))
