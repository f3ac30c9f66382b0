"""How large the rank of a factorization is, by parameters, by energy, or by a budget that linears share.

A linear of O × I parameters becomes R (O + I). A spectrum holds the squared singular values `[M]`, descending, of the
weight or, weighed by its inputs, `svd_llm.output_energies`; what a rank leaves out of it is its loss.

Shapes: O out_features, I in_features, R rank, M min(O, I), L linears, C ranks to choose from.
"""

import math
from collections.abc import Sequence

import torch


def break_even_rank(out_features: int, in_features: int) -> int:
    """The largest rank that saves parameters: the largest R with `R (O + I) < O I`; 0 where none does."""
    return (out_features * in_features - 1) // (out_features + in_features)


def rank_for_ratio(out_features: int, in_features: int, ratio: float, align: int = 16) -> int:
    """The multiple of `align`, of those that save, whose parameters come nearest to `(1 - ratio) O I`.

    Of two that are equally near it is the smaller.

    Raises:
        ValueError: no multiple of `align` saves parameters.
    """
    ranks = _saving_ranks(out_features, in_features, align)
    if not ranks:
        raise ValueError(
            f"align={align}: no rank that is a multiple of it saves parameters of a {out_features} x {in_features} "
            f"linear, break-even is {break_even_rank(out_features, in_features)}; lower align or exclude the linear."
        )
    target = (1 - ratio) * out_features * in_features / (out_features + in_features)
    return min(ranks, key=lambda rank: abs(rank - target))


def rank_for_energy(
    spectrum: torch.Tensor, out_features: int, in_features: int, energy: float, align: int = 16
) -> int | None:
    """The smallest multiple of `align` that keeps a share of the spectrum of at least `energy`.

    Returns:
        The rank; `None` where none that saves parameters keeps so much, and the linear stays dense.
    """
    kept = spectrum.double().cumsum(0)
    enough = (kept >= energy * kept[-1]).tolist()
    ranks = _saving_ranks(out_features, in_features, align)
    return next((rank for rank in ranks if enough[rank - 1]), None)


def allocate_ranks(
    spectra: Sequence[torch.Tensor], shapes: Sequence[tuple[int, int]], budget_parameters: int, align: int = 16
) -> list[int | None]:
    """Ranks of many linears whose sum of losses is small within a budget of parameters.

    All start at the smallest rank. The step to a larger rank of a linear, or to dense, that saves most loss per
    parameter is taken again and again, while it fits the budget: for what it spends no allocation is better, but for
    the last steps (greedy walk along the convex hulls of a multiple-choice knapsack, Sinha and Zoltners 1979).

    Args:
        spectra: L of `[M]`, in units that may be added up over linears; divide by `spectrum.sum()` to make them alike.
        shapes: L of (O, I).
        budget_parameters: of all these linears together.
        align: ranks are multiples of it.

    Returns:
        L ranks; `None` for a linear that stays dense.

    Raises:
        ValueError: a budget that the smallest ranks exceed.
    """
    choices = [[*_saving_ranks(*shape, align), None] for shape in shapes]
    losses, parameters = _choice_tables(choices, spectra, shapes)
    least = int(parameters.amin(1).sum())
    if least > budget_parameters:
        raise ValueError(
            f"budget_parameters={budget_parameters}: below the {least} that the smallest ranks take at align={align}; "
            "raise it, or lower align."
        )
    chosen = _spend(losses, parameters, budget_parameters)
    return [options[index] for options, index in zip(choices, chosen.tolist(), strict=True)]


def _saving_ranks(out_features: int, in_features: int, align: int) -> range:
    return range(align, break_even_rank(out_features, in_features) + 1, align)


def _choice_tables(
    choices: Sequence[Sequence[int | None]], spectra: Sequence[torch.Tensor], shapes: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and parameters of every choice, fp64 `[L, C]` on the CPU; a loss that is infinite is no choice."""
    size = (len(choices), max(map(len, choices)))
    losses, parameters = torch.full(size, math.inf, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for index, (options, spectrum, (rows, columns)) in enumerate(zip(choices, spectra, shapes, strict=True)):
        ranks = torch.tensor(options[:-1], dtype=torch.int64)
        left = spectrum.double().cpu().flip(0).cumsum(0).flip(0)  # the losses of ranks 0 to M - 1
        losses[index, : len(options)] = torch.cat([left[ranks], left.new_zeros(1)])
        parameters[index, : len(ranks)] = ranks.double() * (rows + columns)
        parameters[index, len(ranks) :] = rows * columns
    return losses, parameters


def _spend(losses: torch.Tensor, parameters: torch.Tensor, budget: int) -> torch.Tensor:
    """Indices `[L]` of the choices that the steps of most loss saved per parameter lead to."""
    chosen = torch.zeros(len(losses), 1, dtype=torch.int64)
    while True:
        extra = parameters - parameters.gather(1, chosen)
        left = budget - parameters.gather(1, chosen).sum()
        savings = (losses.gather(1, chosen) - losses) / extra
        savings = savings.masked_fill((extra <= 0) | (extra > left), -math.inf)
        best = int(savings.argmax())
        if savings.flatten()[best] <= 0:
            return chosen.squeeze(1)
        chosen[best // losses.shape[1]] = best % losses.shape[1]
