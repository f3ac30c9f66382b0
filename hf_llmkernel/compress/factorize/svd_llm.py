"""SVD-LLM (Wang et al. 2024, arXiv 2403.07378): the low rank that the outputs on calibration data notice least.

The paper whitens: with `S Sᵀ = G`, G = XᵀX, and `W S = U Σ Vᵀ`, its factors are `U_r Σ_r^½` and `Σ_r^½ V_rᵀ S⁻¹`, and
their loss `tr((W − BA) G (W − BA)ᵀ)` is the sum of the squared singular values left out. As `Σ Vᵀ = Uᵀ W S`, their
product is `U_r U_rᵀ W`, the outputs projected onto their principal components: U and Σ² are the eigenvectors and
eigenvalues of `W G Wᵀ`. So there is no need of S: nothing is inverted, and no dampening falsifies the loss.

Shapes: O out_features, I in_features, M min(O, I), R rank.
"""

from typing import NamedTuple

import torch

from ..solve import damped_cholesky
from .svd import Factors


class OutputComponents(NamedTuple):
    """Principal components of a linear's outputs: orthonormal columns fp64 `[O, M]`, and the sums of squares over the
    tokens along each, fp64 `[M]`, descending: the squared singular values of `W S`."""

    basis: torch.Tensor
    energies: torch.Tensor


def output_components(weight: torch.Tensor, gram: torch.Tensor) -> OutputComponents:
    """Principal components of the outputs `X Wᵀ`.

    Args:
        weight: W, `[O, I]`.
        gram: XᵀX, `[I, I]`.
    """
    rotation, reduced = _reduced(weight)
    energies, vectors = torch.linalg.eigh(reduced @ gram.double() @ reduced.T)
    basis = vectors.flip(1) if rotation is None else rotation @ vectors.flip(1)
    return OutputComponents(basis, energies.flip(0).clamp(min=0))


def output_energies(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The energies of `output_components` alone, which come several times faster; fp64 `[M]`, descending."""
    _, reduced = _reduced(weight)
    return torch.linalg.eigvalsh(reduced @ gram.double() @ reduced.T).flip(0).clamp(min=0)


def _reduced(weight: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Q `[O, I]` with orthonormal columns and R `[I, I]`, W = Q R, where there are more outputs than inputs; else W."""
    exact = weight.double()
    return tuple(torch.linalg.qr(exact)) if exact.shape[0] > exact.shape[1] else (None, exact)


def svd_llm(weight: torch.Tensor, components: OutputComponents, rank: int) -> tuple[Factors, float]:
    """The factors of least loss on the inputs that the components were taken of.

    Row i of a and column i of b have equal norms, where the paper gives both `σ_i^½` in units of activations: the
    same product, and what `truncated_svd` gives for white inputs.

    Args:
        weight: W, `[O, I]`.
        components: of `output_components`.
        rank: R, at most M.

    Returns:
        The factors, and their loss `tr((W − BA) XᵀX (W − BA)ᵀ)`, a sum over tokens and outputs.
    """
    basis = components.basis[:, :rank]
    projected = basis.T @ weight.double()  # [R, I]
    root = projected.norm(dim=1).sqrt()
    a = projected / torch.where(root > 0, root, 1).unsqueeze(1)
    return Factors(a.float(), (basis * root).float()), float(components.energies[rank:].sum())


def svd_llm_update(
    weight: torch.Tensor, a: torch.Tensor, gram: torch.Tensor, dampening: float = 1e-4
) -> tuple[torch.Tensor, float]:
    """The best b for a given a (the paper's closed-form parameter update): `W G aᵀ (a G aᵀ + λI)⁻¹`.

    Args:
        weight: W, `[O, I]`.
        a: `[R, I]`.
        gram: G = XᵀX, `[I, I]`, of inputs that other changes may have moved since a was made.
        dampening: as `damped_cholesky`.

    Returns:
        b, fp32 `[O, R]`, and the dampening used.
    """
    shared = gram.double() @ a.double().T  # [I, R]
    factor, used = damped_cholesky(a.double() @ shared, dampening)
    return torch.cholesky_solve((weight.double() @ shared).T, factor).T.float(), used
