"""`prune_ffn`: removes whole feed-forward neurons, those whose loss the block's output notices least.

A neuron j is row j of gate_proj and up_proj and column j of down_proj. What it adds to the block's output over the
calibration tokens is `x_j w_j`, with x_j its activations and w_j its column of down_proj; the score is the size of that
rank-one matrix, `‖x_j‖₂ ‖w_j‖₂` (Wanda's |W|·‖X‖ of Sun et al. 2023, arXiv 2306.11695, taken over whole columns). What
the removed neurons carried is then given to those that stay, by least squares on the same tokens.

Shapes: O hidden_size, I intermediate_size, K neurons kept, T tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..model.configuration_llm_kernel import MLP_LINEARS, LLMKernelConfig
from .block import Block
from .registry import register
from .stage import Stage
from .statistics import InputGram, InputNorm, InputStatistic

METHODS = ("wanda",)
UPDATES = ("least_squares", "none")


def ffn_neuron_scores(down_weight: torch.Tensor, activation_norms: torch.Tensor) -> torch.Tensor:
    """`‖x_j‖₂ ‖w_j‖₂` of every neuron.

    Args:
        down_weight: `[O, I]`.
        activation_norms: `[I]`, norms over the tokens of what enters down_proj.

    Returns:
        fp32 `[I]`.
    """
    return activation_norms.float() * down_weight.float().norm(dim=0)


def pruned_width(width: int, ratio: float, align: int) -> int:
    """The multiple of `align` nearest to `width * (1 - ratio)`, the smaller one of two.

    Raises:
        ValueError: a width that would be none, or not below the present one.
    """
    target = width * (1 - ratio)
    kept = math.ceil(target / align - 0.5) * align
    if not 0 < kept < width:
        raise ValueError(
            f"prune_ffn: ratio={ratio} of {width} neurons leaves {target:g}, nearest multiple of align={align} {kept}; "
            "change ratio or lower align."
        )
    return kept


def select_neurons(scores: torch.Tensor, ratio: float, align: int = 64) -> torch.Tensor:
    """Indices of the neurons to keep, ascending: int64 `[K]` of scores `[I]`, the highest, K as `pruned_width` says."""
    return scores.topk(pruned_width(len(scores), ratio, align)).indices.sort().values


def least_squares_columns(
    weight: torch.Tensor, gram: torch.Tensor, keep: torch.Tensor, dampening: float = 0.01
) -> torch.Tensor:
    """Weights of the kept inputs that reproduce the whole linear's output best.

    Minimizes `‖X Wᵀ − X_k Vᵀ‖² + λ‖V − W_k‖²` over V in fp64, with X_k the kept columns of X and
    λ = dampening · mean(diag XᵀX): `V = W_k + W_p (XᵀX)_pk ((XᵀX)_kk + λI)⁻¹`, p the pruned inputs.

    Args:
        weight: W, `[O, I]`.
        gram: XᵀX, `[I, I]`.
        keep: int64 `[K]`.
        dampening: of the change, relative to the mean of the diagonal.

    Returns:
        V, fp32 `[O, K]`.

    Raises:
        ValueError: a Gram matrix that is singular in spite of the dampening.
    """
    exact, gram = weight.double(), gram.double()
    pruned = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    pruned[keep] = False
    lost = exact[:, pruned] @ gram[pruned][:, keep]  # [O, K]
    damped = gram[keep][:, keep] + dampening * gram.diagonal().mean() * torch.eye(len(keep), dtype=torch.float64)
    factor, fault = torch.linalg.cholesky_ex(damped)
    if fault:
        raise ValueError(f"dampening={dampening}: the Gram matrix of the activations is singular; raise it.")
    return (exact[:, keep] + torch.cholesky_solve(lost.T, factor).T).float()


@register("prune_ffn")
@dataclass(frozen=True, kw_only=True)
class PruneFFN(Stage):
    """Removes a share of the feed-forward neurons of every layer.

    Args:
        ratio: share to remove, in (0, 1).
        method: `"wanda"`, see the module.
        align: the width that stays is a multiple of it, the nearest; matrix kernels like multiples of 64.
        update: `"least_squares"` lets the neurons that stay take over, `"none"` leaves their weights alone.
        dampening: of that update, see `least_squares_columns`.
    """

    ratio: float
    method: str = "wanda"
    align: int = 64
    update: str = "least_squares"
    dampening: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio!r}: must be above 0 and below 1; or leave the stage out.")
        if type(self.align) is not int or self.align < 1:
            raise ValueError(f"align={self.align!r}: must be an integer of at least 1; 64 suits matrix kernels.")
        if not isinstance(self.dampening, int | float) or not 0 <= self.dampening < math.inf:
            raise ValueError(f"dampening={self.dampening!r}: must be a number of at least 0; 0.01 is the default.")
        for name, legal in (("method", METHODS), ("update", UPDATES)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {list(legal)}.")

    @property
    def needs_data(self) -> bool:
        return True

    def plan(self, layer: LLMKernelConfig) -> dict[str, Any]:
        if "mlp" in (layer.skip or []):
            return {}
        for leaf in MLP_LINEARS:
            if leaf in layer.linear_shapes() and not layer.linear_form(leaf).is_dense:
                raise ValueError(
                    f"prune_ffn: {leaf} is stored as {layer.linear_form(leaf).to_dict()}; prune before other stages, "
                    "from a checkpoint whose feed-forward is dense."
                )
        before = layer.intermediate_size
        layer.intermediate_size = pruned_width(before, self.ratio, self.align)
        reached = 1 - layer.intermediate_size / before
        return {"neurons_before": before, "neurons": layer.intermediate_size, "ratio_reached": reached}

    def statistics(self, block: Block) -> Mapping[str, InputStatistic]:
        if "down_proj" not in block.linears():
            return {}
        return {"down_proj": InputGram() if self.update == "least_squares" else InputNorm()}

    def apply(self, block: Block, statistics: Mapping[str, Any]) -> None:
        if not statistics:
            return
        inputs, down = statistics["down_proj"], block.weight("down_proj")
        keep = select_neurons(ffn_neuron_scores(down, inputs.norm), self.ratio, self.align)
        if self.update == "least_squares":
            down = least_squares_columns(down, inputs.gram, keep, self.dampening)
        else:
            down = down[:, keep]
        self.plan(block.layer)
        block.set_weight("down_proj", down)
        for leaf in ("gate_proj", "up_proj"):
            block.keep_outputs(leaf, keep)
