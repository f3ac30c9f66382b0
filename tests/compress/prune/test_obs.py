"""OBS losses against least squares on the inputs, and the selection against an exhaustive one."""

import pytest
import torch

from hf_llmkernel.compress.prune.compensation import centred_gram, least_squares_columns
from hf_llmkernel.compress.prune.obs import obs_scores, obs_select
from hf_llmkernel.compress.prune.wanda import wanda_scores
from hf_llmkernel.compress.prune.width import select
from tests.compress.prune.conftest import HEAD_DIM, IN, TOKENS


def loss_without(layer, removed, intercept=False):
    """What `torch.linalg.lstsq` leaves of the outputs without these columns of the inputs."""
    inputs = layer.inputs.double()
    kept = inputs[:, [j for j in range(IN) if j not in removed]]
    if intercept:
        kept = torch.cat([kept, kept.new_ones(TOKENS, 1)], dim=1)
    outputs = inputs @ layer.weight.double().T
    return (outputs - kept @ torch.linalg.lstsq(kept, outputs).solution).square().sum()


@pytest.mark.parametrize("size", [1, HEAD_DIM])
@pytest.mark.parametrize("intercept", [False, True])
def test_a_score_is_the_loss_that_least_squares_leaves(layer, size, intercept):
    gram = centred_gram(layer.gram, layer.mean, TOKENS) if intercept else layer.gram
    scores, used = obs_scores(layer.weight, gram, size, dampening=0)
    groups = [range(start, start + size) for start in range(0, IN, size)]
    expected = torch.stack([loss_without(layer, group, intercept) for group in groups])
    assert used == 0
    torch.testing.assert_close(scores.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("size", "count"), [(1, 15), (HEAD_DIM, 3)])
def test_one_at_a_time_removes_the_least_of_what_is_left(layer, size, count):
    groups = {start // size: list(range(start, start + size)) for start in range(0, IN, size)}
    removed: list[int] = []
    while len(groups) > count:
        losses = {group: float(loss_without(layer, removed + columns)) for group, columns in groups.items()}
        removed += groups.pop(min(losses, key=losses.__getitem__))
    kept, _ = obs_select(layer.weight, layer.gram, count, size, rounds=IN, dampening=0)
    assert kept.tolist() == list(groups)


def test_one_round_is_the_scores_alone(layer):
    kept, used = obs_select(layer.weight, layer.gram, 10, rounds=1)
    assert torch.equal(kept, select(obs_scores(layer.weight, layer.gram)[0], 10))
    assert used == 0.01


def test_of_two_columns_that_replace_each_other_one_stays():
    inputs = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    inputs[:, 1] = inputs[:, 0]  # as are two neurons with the same rows
    weight = torch.ones(3, 6)
    gram = inputs.T @ inputs
    assert obs_select(weight, gram, 4, rounds=1)[0].tolist() == [2, 3, 4, 5]
    assert len({0, 1} & set(obs_select(weight, gram, 4, rounds=2)[0].tolist())) == 1


def test_correlations_tell_more_than_wanda_where_least_squares_follows(layer):
    by_wanda = select(wanda_scores(layer.weight, layer.inputs.norm(dim=0)), 15)
    by_obs, _ = obs_select(layer.weight, layer.gram, 15)
    losses = [
        layer.loss(least_squares_columns(layer.weight, layer.gram, keep).weight, keep) for keep in (by_wanda, by_obs)
    ]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("rounds", [1, 2, 4, 7, 100])
def test_any_number_of_rounds_keeps_the_count(layer, rounds):
    assert len(obs_select(layer.weight, layer.gram, 15, rounds=rounds)[0]) == 15


def test_nothing_to_remove_keeps_all(layer):
    assert obs_select(layer.weight, layer.gram, IN)[0].tolist() == list(range(IN))
