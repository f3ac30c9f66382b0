"""Factors of Gram matrices, in fp64, with a dampening that is raised where the matrix is not positive definite.

Shapes: I in_features.
"""

import math

import torch

LARGEST_DAMPENING = 1.0
SMALLEST_RAISED_DAMPENING = 1e-6
LARGEST_WHOLE_INVERSE = 128


def damped_cholesky(gram: torch.Tensor, dampening: float) -> tuple[torch.Tensor, float]:
    """Lower Cholesky factor L of `G + λ·mean(diag G)·I`, λ the first that works of dampening, 10·dampening, … up to 1.

    A dampening of 0 is raised to 1e-6 first; one above 1 is tried alone.

    Args:
        gram: G, symmetric `[I, I]`.
        dampening: relative to the mean of the diagonal.

    Returns:
        L, fp64 `[I, I]`, and the λ that was used: one above `dampening` is worth a line in a report.

    Raises:
        ValueError: a dampening below 0, a Gram matrix that is not finite, or one that no dampening makes definite.
    """
    if not 0 <= dampening < math.inf:
        raise ValueError(f"dampening={dampening!r}: must be a number of at least 0; 0.01 is usual.")
    if not gram.isfinite().all():
        raise ValueError("gram: has values that are not finite; look for inputs that overflow, calibrate in float32.")
    damped = gram.to(torch.float64, copy=True)
    exact_diagonal = gram.diagonal().double()
    # Of inputs that are all zero every solution is right: those of the identity are 0.
    scale = exact_diagonal.mean() if gram.any() else exact_diagonal.new_ones(())
    used = max(dampening, 0.0 if gram.any() else SMALLEST_RAISED_DAMPENING)
    while True:
        damped.diagonal().copy_(exact_diagonal + used * scale)
        factor, fault = torch.linalg.cholesky_ex(damped)
        if not fault:
            return factor, used
        raised = max(10 * used, SMALLEST_RAISED_DAMPENING)
        if raised > LARGEST_DAMPENING * 1.001:  # 0.01 taken tenfold twice is a little above 1
            raise ValueError(
                f"dampening={dampening}: the Gram matrix is not positive definite, not even at {used:g}; "
                "look for inputs that are all zero, or calibrate on more text."
            )
        used = raised


def damped_inverse_cholesky(gram: torch.Tensor, dampening: float) -> tuple[torch.Tensor, float]:
    """Upper Cholesky factor U of the inverse, `UᵀU = (G + λ·mean(diag G)·I)⁻¹`, as GPTQ and SparseGPT take it.

    With rows and columns in reverse order, `damped_cholesky` gives R upper with RRᵀ the damped matrix, and U = R⁻¹:
    one factorization and one triangular inverse instead of two factorizations and a full inverse.

    Returns:
        U, fp64 `[I, I]`, and λ as `damped_cholesky`, which also says what it raises.
    """
    factor, used = damped_cholesky(gram.flip(0, 1), dampening)
    return triangular_inverse(factor).flip(0, 1), used


def triangular_inverse(lower: torch.Tensor) -> torch.Tensor:
    """Inverse of a lower triangular matrix `[I, I]`, by halves: matrix products, which leave its zeros out.

    Half the time of a triangular solve against the identity, which computes them.
    """
    size = len(lower)
    if size <= LARGEST_WHOLE_INVERSE:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = triangular_inverse(lower[:half, :half])
    inverse[half:, half:] = triangular_inverse(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse
