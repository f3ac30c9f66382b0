"""The knapsack against all mixes tried one by one."""

import itertools
import random

import pytest

from hf_llmkernel.compress.search.knapsack import knapsack_front


def items(seed: int, count: int, most: int, whole: bool) -> tuple[list[list[float]], list[list[float]]]:
    """Losses, some below 0, and costs of random choices, as many as each item likes."""
    choose = random.Random(seed)
    widths = [choose.randint(1, most) for _ in range(count)]
    losses = [[choose.gauss(1, 1) for _ in range(width)] for width in widths]
    costs = [[choose.randint(1, 20) if whole else 20 * choose.random() for _ in range(width)] for width in widths]
    return losses, costs


def all_mixes(losses, costs) -> list[tuple[float, float]]:
    """Cost and loss of every mix."""
    mixes = itertools.product(*(range(len(own)) for own in losses))

    def total(table, mix) -> float:
        return sum(own[choice] for own, choice in zip(table, mix, strict=True))

    return [(total(costs, mix), total(losses, mix)) for mix in mixes]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_every_budget_has_its_best_mix(seed, whole):
    losses, costs = items(seed, 5, 4, whole)
    front, mixes = knapsack_front(losses, costs), all_mixes(losses, costs)
    least, most = min(mixes)[0], max(mixes)[0]
    for budget in [least, most, *(least + (most - least) * step / 40 for step in range(41))]:
        point = front.within(budget + 1e-9)
        best = min(loss for cost, loss in mixes if cost <= budget + 1e-9)
        assert point is not None and front.losses[point].item() == pytest.approx(best, abs=1e-9)
        mix = front.choices[point].tolist()
        for table, total in ((losses, front.losses), (costs, front.costs)):
            parts = [own[choice] for own, choice in zip(table, mix, strict=True)]
            assert sum(parts) == pytest.approx(total[point].item())
    assert front.within(least - 1e-6) is None


def test_front_rises_in_cost_and_falls_in_loss():
    losses, costs = items(7, 6, 5, whole=True)
    front = knapsack_front(losses, costs)
    assert (front.costs.diff() > 0).all() and (front.losses.diff() < 0).all()


def test_thinned_front_is_within_its_steps_of_the_best():
    choose = random.Random(3)
    costs = [[20 * choose.random() for _ in range(4)] for _ in range(7)]
    losses = [[(20 - cost) * choose.uniform(0.9, 1.1) for cost in own] for own in costs]
    points = 12
    thin, exact = knapsack_front(losses, costs, points), knapsack_front(losses, costs)
    assert len(thin.costs) <= points < len(exact.costs)
    step = (max(cost for cost, _ in all_mixes(losses, costs)) - exact.costs[0].item()) / (points - 1)
    for cost, loss in zip(exact.costs.tolist(), exact.losses.tolist(), strict=True):
        point = thin.within(cost + len(losses) * step)
        assert point is not None and thin.losses[point] <= loss + 1e-9
    assert thin.costs[0] == exact.costs[0]


def test_a_choice_that_costs_more_and_loses_more_is_never_taken():
    front = knapsack_front([[0.0, 1.0, 2.0]] * 3, [[10, 20, 5]] * 3)
    assert 1 not in front.choices
    assert front.costs.tolist() == [15, 20, 25, 30] and front.losses.tolist() == [6, 4, 2, 0]
