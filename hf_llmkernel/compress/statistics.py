"""What calibration tells about the inputs of a linear: fp32 sums that grow with every batch.

Shapes: T tokens, I in_features.
"""

from typing import Protocol

import torch


class InputStatistic(Protocol):
    """A sum over tokens. `add` takes inputs `[..., I]`; `is_finite` says whether they were all finite."""

    def add(self, inputs: torch.Tensor) -> None: ...

    def is_finite(self) -> bool: ...


class InputNorm:
    """`Σ x²` of every input feature: `norm` is fp32 `[I]`, the Euclidean norm over all tokens."""

    def __init__(self) -> None:
        self.squares = torch.zeros(())

    def add(self, inputs: torch.Tensor) -> None:
        self.squares = self.squares + inputs.float().flatten(0, -2).square().sum(0)

    def is_finite(self) -> bool:
        return bool(self.squares.isfinite().all())

    @property
    def norm(self) -> torch.Tensor:
        return self.squares.sqrt()


class InputGram:
    """`XᵀX` of the inputs X `[T, I]`: `gram` is fp32 `[I, I]`."""

    def __init__(self) -> None:
        self.gram = torch.zeros(())

    def add(self, inputs: torch.Tensor) -> None:
        rows = inputs.float().flatten(0, -2)
        self.gram = torch.addmm(self.gram, rows.T, rows) if self.gram.dim() else rows.T @ rows

    def is_finite(self) -> bool:
        return bool(self.gram.isfinite().all())

    @property
    def norm(self) -> torch.Tensor:
        return self.gram.diagonal().sqrt()
