"""The multiple-choice knapsack: one choice for every item, the least loss within a budget of cost, for all budgets.

Nemhauser and Ullmann 1969 (Discrete Dynamic Programming and Capital Allocation), with one choice of each class as in
Kellerer, Pferschy and Pisinger 2004 (Knapsack Problems, 11.5): item by item, of all mixes so far only those stay that
no other one beats in cost and loss together. What stays after the last item is the whole front. Where it grows beyond
a limit it is thinned to even steps of cost.

Shapes: N items, C choices, F points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

POINTS = 50_000


@dataclass(frozen=True)
class Front:
    """Mixes that no other one beats, by ascending cost and descending loss.

    Args:
        costs, losses: fp64 `[F]`, sums over the items.
        choices: int64 `[F, N]`.
    """

    costs: torch.Tensor
    losses: torch.Tensor
    choices: torch.Tensor

    def within(self, budget: float) -> int | None:
        """Index of the point of least loss that costs at most `budget`; `None` where even the cheapest costs more."""
        count = int(torch.searchsorted(self.costs, budget, right=True))
        return count - 1 if count else None


def knapsack_front(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], points: int = POINTS
) -> Front:
    """The front of all mixes.

    Exact where no more than `points` partial mixes stay at a time. Otherwise, for every budget, at least as good as the
    best mix within that budget less N steps; `points - 1` steps are the dearest mix's cost less the cheapest's.

    Args:
        losses, costs: of every choice of every item, `[N, C]`; any real numbers. C may differ between items.
        points: most partial mixes kept, at least 2.
    """
    front = Front(torch.zeros(1).double(), torch.zeros(1).double(), torch.zeros(1, 0).long())
    for item_losses, item_costs in zip(losses, costs, strict=True):
        front = _thinned(_undominated(_extended(front, item_losses, item_costs)), points)
    return front


def _extended(front: Front, losses: Sequence[float], costs: Sequence[float]) -> Front:
    """Every mix with every choice of one more item, in no order."""
    chosen = torch.arange(len(losses)).repeat(len(front.costs))
    return Front(
        (front.costs[:, None] + torch.tensor(costs, dtype=torch.float64)).flatten(),
        (front.losses[:, None] + torch.tensor(losses, dtype=torch.float64)).flatten(),
        torch.cat([front.choices.repeat_interleave(len(losses), dim=0), chosen[:, None]], dim=1),
    )


def _undominated(front: Front) -> Front:
    """The mixes that cost less than all others of their loss or a lower one, by ascending cost."""
    order = front.losses.argsort(stable=True)
    order = order[front.costs[order].argsort(stable=True)]
    losses = front.losses[order]
    least_before = torch.cat([losses.new_full((1,), float("inf")), losses.cummin(0).values[:-1]])
    return _taken(front, order[losses < least_before])


def _thinned(front: Front, points: int) -> Front:
    """The cheapest mix, and of every step of cost the one of least loss."""
    if len(front.costs) <= points:
        return front
    step = (front.costs[-1] - front.costs[0]) / (points - 1)
    steps = ((front.costs - front.costs[0]) / step).ceil()  # the cheapest alone in the first
    last = torch.ones(len(steps), dtype=torch.bool)
    last[:-1] = steps[1:] != steps[:-1]
    return _taken(front, last)


def _taken(front: Front, which: torch.Tensor) -> Front:
    return Front(front.costs[which], front.losses[which], front.choices[which])
