"""ADMM (Boža 2024, arXiv 2401.02938): a weight that may be dense and one that must be sparse, drawn together.

The dense one is the best reconstruction near the sparse one, one product with a fixed inverse; the sparse one keeps the
largest entries of the dense one. Three things differ from the paper, each measured to lower the error:

- it starts where SparseGPT ends rather than at the dense weight, which replaces the slow rise of the sparsity;
- an input's penalty is the geometric mean of what its weight costs alone, `H_jj`, and with all others making up for
  it, `1 / (H⁻¹)_jj`, where the paper takes the former;
- conjugate gradient on the mask found ends it, as in ALPS (Meng et al. 2024, arXiv 2406.07831).

Shapes: O out_features, I in_features.
"""

from collections.abc import Callable

import torch

from ..solve import damped_inverse_cholesky
from .least_squares import least_squares
from .mask import select_mask
from .reconstruction import Reconstruction
from .sparsegpt import compensate, without_dead_inputs

DAMPENING = 0.1


def admm(
    weight: torch.Tensor,
    gram: torch.Tensor,
    mask: torch.Tensor | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    scope: str = "layer",
    dampening: float = DAMPENING,
    rho: float = 1.0,
    steps: int = 8,
    polish: int = 4,
) -> Reconstruction:
    """Mask and weights together, or the weights alone on a given mask.

    Args:
        weight: `[O, I]`.
        gram: XᵀX, `[I, I]`.
        mask: bool `[O, I]`, true where weights stay; by default searched for.
        sparsity: share to remove; `None` with N:M, and with a mask.
        pattern: `"unstructured"` or `"N:M"`; a mask needs none.
        scope: where unstructured weights compete, see `select_mask`.
        dampening: of the Gram matrix, relative to each input's own diagonal entry; raised where needed.
        rho: weight of the penalty; below 1 the mask changes more freely, and may not settle.
        steps: of ADMM.
        polish: steps of conjugate gradient at the end.

    Raises:
        ValueError: what `check_sparsity` and `damped_cholesky` refuse.
    """
    weight, gram = without_dead_inputs(weight, gram)
    scale = gram.diagonal().sqrt()
    weight, correlation = weight * scale, gram / scale / scale.unsqueeze(1)
    upper, used = damped_inverse_cholesky(correlation, dampening)
    start, kept = compensate(weight, upper.float(), mask, sparsity, pattern)
    hessian = correlation + used * torch.eye(len(gram), device=gram.device)
    root = (hessian.diagonal() / upper.float().square().sum(0)) ** 0.25  # of the penalty
    choose = None if mask is not None else lambda sizes: select_mask(sizes, sparsity, pattern, scope)
    scaled_hessian = hessian / root / root.unsqueeze(1)
    found, kept = alternate(weight * root, start * root, kept, scaled_hessian, rho, steps, choose)
    polished = least_squares(weight, correlation, kept, used, polish, start=found / root)
    return Reconstruction(polished / scale, kept, used)


def alternate(
    weight: torch.Tensor,
    sparse: torch.Tensor,
    kept: torch.Tensor,
    hessian: torch.Tensor,
    rho: float,
    steps: int,
    choose: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps of ADMM (algorithm 1 of Boža) for `tr((W−V) H (W−V)ᵀ)`, V sparse, with the penalty `ρ‖V − Z‖²`.

    Args:
        weight: W, fp32 `[O, I]`.
        sparse, kept: Z and its mask to begin with, `[O, I]`.
        hessian: H, fp32 `[I, I]`.
        rho, steps: of the iteration.
        choose: the mask for the sizes `[O, I]` of a dense weight; `None` keeps the first one.

    Returns:
        Z and its mask.
    """
    penalized = hessian + rho * torch.eye(len(hessian), device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(penalized))  # ρ conditions it well enough for fp32
    dual = (weight - sparse) @ hessian / rho * ~kept  # where the gradient is zero on the mask, V = Z stays
    for _ in range(steps):
        dense = torch.addmm(weight, sparse - dual - weight, inverse, alpha=rho) + dual
        if choose is not None:
            kept = choose(dense.abs())
        sparse = dense * kept
        dual = dense - sparse
    return sparse, kept
