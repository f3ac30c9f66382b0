"""`refit`: what writes into the residual stream is fitted to where the uncompressed model would be.

Compressed blocks leave hidden states that drift away from the uncompressed model's, dropped ones more so. With h the
states that enter o_proj's or down_proj's sum, R the uncompressed model's after it, and X the inputs, the weight becomes
the V that minimizes `‖R − h − X Vᵀ‖² + λ‖V − W‖²`: like GPTAQ (Li et al. 2025, arXiv 2504.02692), which corrects the
target of each linear for the drift of its inputs, but on the residual stream itself, so that nothing is left to the
next block that this one can repair. A stage of its own, it goes before sparsify, quantize or factorize, after pruning.

Shapes: O out_features, I in_features.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..model.configuration_llm_kernel import LLMKernelConfig
from .block import Block, matrix_form
from .inputs import InputStatistic
from .registry import register
from .solve import damped_cholesky
from .stage import MatrixStage, refuse_form

RESIDUAL_LINEARS = ("o_proj", "down_proj")


def refit_weight(
    weight: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor, dampening: float
) -> tuple[torch.Tensor, float]:
    """`W + (YᵀX − W G)(G + λI)⁻¹`, λ = dampening · mean(diag G): the least squares weight for targets Y, drawn to W.

    Args:
        weight: W, `[O, I]`.
        gram: G = XᵀX, `[I, I]`.
        cross: YᵀX, `[O, I]`.
        dampening: as `damped_cholesky`.

    Returns:
        fp32 `[O, I]`, and the dampening used.
    """
    factor, used = damped_cholesky(gram, dampening)
    exact = weight.double()
    missing = cross.double() - exact @ gram.double()
    return (exact + torch.cholesky_solve(missing.T, factor).T).float(), used


@register("refit")
@dataclass(frozen=True, kw_only=True)
class Refit(MatrixStage):
    """Fits o_proj and down_proj to the hidden states of the uncompressed model.

    Args:
        dampening: relative to the mean of the diagonal of the Gram matrix; draws the weights to what they were.
    """

    dampening: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.dampening, int | float) or not 0 <= self.dampening < math.inf:
            raise ValueError(f"dampening={self.dampening!r}: must be a number of at least 0; 0.1 is the default.")

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def statistic(self) -> str:
        return "target"

    @property
    def solve_products(self) -> float:
        return 2.0

    def chosen(self, names: Iterable[str]) -> list[str]:
        fitted = [name for name in super().chosen(names) if name.partition(".")[0] in RESIDUAL_LINEARS]
        return [name for name in fitted if not name.endswith(".a")]

    def plan_matrix(self, layer: LLMKernelConfig, name: str, target: Any) -> dict[str, Any]:
        if not matrix_form(layer, name).is_dense:
            refuse_form("refit", layer, name, "refit before sparsify and quantize, or exclude it.")
        return {}

    def change(self, block: Block, name: str, inputs: InputStatistic | None, target: Any) -> None:
        assert inputs is not None, "a stage with needs_data is given statistics"
        cross, bias = inputs.cross, block.bias(name.partition(".")[0])
        if bias is not None:
            cross = cross - torch.outer(bias, inputs.sums.float())
        weight, used = refit_weight(block.weight(name), inputs.gram, cross, self.dampening)
        if used > self.dampening:
            block.note(stage=self.name, matrix=name, dampening=used)
        block.set_weight(name, weight)
