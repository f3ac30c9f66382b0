"""What calibration tells about the inputs of linears: sums that grow with every batch.

Shapes: T tokens, I in_features, O out_features.
"""

import math

import torch

from .. import processes

NEEDS = ("moments", "gram", "target")
GRAM_STRIP = 512


class InputStatistic:
    """Sums over the tokens of inputs X `[T, I]`.

    Args:
        needs: `"moments"` for sums, squares and magnitudes of each feature, and the largest; `"gram"` for `XᵀX` too;
            `"target"` also for `YᵀX`, Y `[T, O]` what the linear should put out (see `reference.py`).

    `count` is T; `gram` is fp32 `[I, I]`, `cross` fp32 `[O, I]`; the rest are `[I]`.
    """

    def __init__(self, needs: str = "moments"):
        self.needs = needs
        self.count = 0
        self.sums = self.magnitudes = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)
        self.largest = torch.zeros(())
        self._gram = torch.zeros(())
        self.cross = torch.zeros(())

    def add(self, inputs: torch.Tensor, target: torch.Tensor | None = None) -> None:
        """Adds a batch `[..., I]`, with its targets `[..., O]` where they are asked for."""
        rows = inputs.flatten(0, -2)  # [T, I]
        self.count += len(rows)
        self.sums, sizes = self.sums + rows.sum(0).double(), rows.abs()
        self.magnitudes = self.magnitudes + sizes.sum(0).double()
        largest = sizes.amax(0) if len(rows) else rows.new_zeros(rows.shape[1])
        self.largest = torch.maximum(self.largest.to(rows.device), largest)
        if self.has_gram:
            self._add_gram(rows)
        else:
            self.squares = self.squares + rows.square().sum(0).double()
        if target is not None:
            self.cross = self.cross + target.flatten(0, -2).T @ rows

    @property
    def has_gram(self) -> bool:
        """Whether `XᵀX` is known."""
        return self.needs != "moments"

    def _add_gram(self, rows: torch.Tensor) -> None:
        """The upper triangle, in strips, which saves up to half of the products."""
        width = rows.shape[1]
        if not self._gram.dim():
            self._gram = rows.new_zeros(width, width)
        for begin in range(0, width, GRAM_STRIP):
            end = min(begin + GRAM_STRIP, width)
            self._gram[begin:end, begin:].addmm_(rows[:, begin:end].T, rows[:, begin:])

    @property
    def gram(self) -> torch.Tensor:
        """`XᵀX`, symmetric to the bit."""
        upper = self._gram.triu()
        return upper + upper.triu(1).T

    @property
    def norm(self) -> torch.Tensor:
        """Euclidean norm of each feature over all tokens, fp32."""
        squares = self._gram.diagonal() if self.has_gram else self.squares
        return squares.clamp(min=0).sqrt().float()

    @property
    def mean(self) -> torch.Tensor:
        """Mean of each feature, fp32."""
        return (self.sums / max(self.count, 1)).float()

    @property
    def mean_magnitude(self) -> torch.Tensor:
        """Mean of each feature's absolute value, fp32."""
        return (self.magnitudes / max(self.count, 1)).float()

    @property
    def variance(self) -> torch.Tensor:
        """Variance of each feature over tokens (the unbiased estimate), fp32."""
        squares = self.norm.double().square() - self.sums.square() / max(self.count, 1)
        return (squares / max(self.count - 1, 1)).clamp(min=0).float()

    def is_finite(self) -> bool:
        """Whether all inputs were finite, and their squares too."""
        return bool(self.norm.isfinite().all()) and bool(self.sums.isfinite().all())

    def all_reduce(self) -> None:
        """Adds up what all processes have seen; each then has the sums over all.

        One that has seen nothing adds an empty batch `[0, I]` before, so that its sums have their shape.
        """
        self.count = sum(processes.gather(self.count))
        for tensor in (self.sums, self.magnitudes, self.squares, self._gram, self.cross):
            if tensor.dim():
                processes.add_up(tensor)
        device = self.largest.device
        self.largest = torch.stack(processes.gather(self.largest.cpu())).amax(0).to(device)

    def through(self, weight: torch.Tensor) -> "InputStatistic":
        """The statistic of `X Wᵀ` for a weight `[O, I]`: what the second factor of a low rank takes in.

        Exact where there is a Gram matrix, but for the magnitudes, which are those of Gaussian outputs, and the
        largest, which are bounds.
        """
        outputs = InputStatistic(self.needs)
        outputs.count, outputs.sums = self.count, weight.double() @ self.sums
        if self.has_gram:
            outputs._gram = weight @ self.gram @ weight.T
            outputs.cross = self.cross @ weight.T if self.cross.dim() else self.cross
            squares = outputs._gram.diagonal().double()
        else:  # features taken as uncorrelated but for their means
            spread = self.variance.double() * max(self.count - 1, 0)
            squares = weight.double().square() @ spread + outputs.sums.square() / max(self.count, 1)
        outputs.squares, outputs.largest = squares, weight.abs() @ self.largest
        outputs.magnitudes = (squares * self.count * 2 / math.pi).sqrt()
        return outputs

    def after(self, change: torch.Tensor) -> "InputStatistic":
        """The statistic of inputs that a stage has changed, see `changed_inputs`."""
        return self.scaled(change) if change.is_floating_point() else self.keep(change)

    def scaled(self, factors: torch.Tensor) -> "InputStatistic":
        """The statistic of each feature times a factor of its own, `[I]`."""
        scaled = InputStatistic(self.needs)
        exact = factors.double()
        scaled.count, scaled.sums, scaled.magnitudes = self.count, self.sums * exact, self.magnitudes * exact.abs()
        scaled.largest = self.largest * factors.abs()
        if self.has_gram:
            scaled._gram = self.gram * factors * factors.unsqueeze(1)
            scaled.cross = self.cross * factors if self.cross.dim() else self.cross
        else:
            scaled.squares = self.squares * exact.square()
        return scaled

    def keep(self, indices: torch.Tensor) -> "InputStatistic":
        """The statistic of some of the features, after the others were removed."""
        kept = InputStatistic(self.needs)
        kept.count, kept.sums, kept.magnitudes = self.count, self.sums[indices], self.magnitudes[indices]
        kept.largest = self.largest[indices]
        if self.has_gram:
            kept._gram = self.gram[indices][:, indices]
            kept.cross = self.cross[:, indices] if self.cross.dim() else self.cross
        else:
            kept.squares = self.squares[indices]
        return kept


def changed_inputs(values: torch.Tensor, change: torch.Tensor | None) -> torch.Tensor:
    """Inputs `[..., I]` after a stage has removed some, or folded factors into what they come from.

    `change` is int64 `[K]`, the indices of those that stay, or fp32 `[I]`, the factors; `None` of a stage that did
    neither.
    """
    if change is None:
        return values
    return values * change if change.is_floating_point() else values[..., change]
