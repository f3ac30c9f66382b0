"""A sparse weight that reproduces a linear's outputs, and how far it is from doing so.

Shapes: O out_features, I in_features.
"""

from typing import NamedTuple

import torch


class Reconstruction(NamedTuple):
    """A sparse weight and how it was had.

    `weight` is fp32 `[O, I]`, zero outside `mask`, bool `[O, I]`; `dampening` is the one used, above the one asked for
    where the Gram matrix needed it.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    dampening: float


def reconstruction_loss(weight: torch.Tensor, new_weight: torch.Tensor, gram: torch.Tensor) -> float:
    """`‖X Wᵀ − X Vᵀ‖² / ‖X Wᵀ‖²`, from the Gram matrix: `tr((W−V) G (W−V)ᵀ) / tr(W G Wᵀ)`.

    Args:
        weight: W, `[O, I]`.
        new_weight: V, `[O, I]`.
        gram: G = XᵀX, `[I, I]`.

    Returns:
        0 where the outputs are the same, 1 where V is zero.
    """
    lost = _output_energy(weight.float() - new_weight.float(), gram.float())
    return lost / _output_energy(weight.float(), gram.float()) if lost else 0.0


def _output_energy(weight: torch.Tensor, gram: torch.Tensor) -> float:
    return float(((weight @ gram) * weight).sum(dtype=torch.float64))
