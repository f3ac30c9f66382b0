"""Least squares on a given mask: the weights that stay become the best ones, whatever chose them.

Shapes: O out_features, I in_features.
"""

import torch


def least_squares(
    weight: torch.Tensor,
    gram: torch.Tensor,
    mask: torch.Tensor,
    dampening: float = 0.01,
    steps: int = 20,
    tolerance: float = 1e-2,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Minimizes `‖X Wᵀ − X Vᵀ‖² + λ‖W − V‖²` over the V that are zero outside the mask, λ = dampening · mean(diag G).

    Every row is a least squares problem of its own over its own columns. All are solved at once by conjugate gradient,
    preconditioned by the diagonal, as ALPS does after its search (Meng et al. 2024, arXiv 2406.07831): one product
    with the Gram matrix a step, no factorization.

    Args:
        weight: W, `[O, I]`.
        gram: G = XᵀX, `[I, I]`.
        mask: bool `[O, I]`, true where weights stay.
        dampening: relative to the mean of the diagonal; draws V towards W.
        steps: at most.
        tolerance: ends the steps where the preconditioned residual, over all rows, is this share of its first value.
        start: V to begin with, `[O, I]`; by default W on the mask.

    Returns:
        V, fp32 `[O, I]`.
    """
    gram, mask = gram.float(), mask.float()
    shift = dampening * gram.diagonal().mean()
    inverse_diagonal = 1 / (gram.diagonal() + shift).clamp(min=SMALLEST)
    solution = (weight if start is None else start).float() * mask
    change = weight.float() - solution
    residual = torch.addmm(shift * change, change, gram) * mask
    direction = residual * inverse_diagonal
    energy = first = (residual * direction).sum(1, keepdim=True)  # [O, 1]
    for _ in range(steps):
        if energy.sum() <= tolerance**2 * first.sum():
            break
        product = torch.addmm(shift * direction, direction, gram)
        length = energy / (direction * product).sum(1, keepdim=True).clamp(min=SMALLEST)
        solution.addcmul_(direction, length)
        residual.addcmul_(product.mul_(mask), length, value=-1)
        scaled = residual * inverse_diagonal
        before, energy = energy, (residual * scaled).sum(1, keepdim=True)
        direction = scaled.addcmul_(direction, energy / before.clamp(min=SMALLEST))
    return solution


SMALLEST = 1e-30  # of a divisor: a row that is solved, or without inputs, stands still
