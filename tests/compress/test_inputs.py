"""Statistics of inputs against the inputs themselves."""

import pytest
import torch

from hf_llmkernel.compress import inputs as statistics
from hf_llmkernel.compress.inputs import InputStatistic, changed_inputs


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 50, 40, generator=generator) @ torch.randn(40, 40, generator=generator) + 0.3


def gathered(x: torch.Tensor, needs: str) -> InputStatistic:
    statistic = InputStatistic(needs)
    for batch in x.split(2):
        statistic.add(batch)
    return statistic


@pytest.mark.parametrize("needs", ["moments", "gram"])
def test_moments(x, needs):
    rows, statistic = x.flatten(0, 1).double(), gathered(x, needs)
    assert statistic.count == 300 and statistic.is_finite()
    for found, expected in (
        (statistic.norm, rows.norm(dim=0)),
        (statistic.mean, rows.mean(0)),
        (statistic.mean_magnitude, rows.abs().mean(0)),
        (statistic.variance, rows.var(0)),
        (statistic.largest, rows.abs().amax(0)),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_gram_in_strips_is_symmetric_and_whole(x, monkeypatch):
    monkeypatch.setattr(statistics, "GRAM_STRIP", 16)
    rows, gram = x.flatten(0, 1).double(), gathered(x, "gram").gram
    torch.testing.assert_close(gram.double(), rows.T @ rows, rtol=1e-5, atol=1e-3)
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("needs", ["moments", "gram"])
def test_what_a_first_factor_puts_out(x, needs):
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    if needs == "moments":  # without the Gram matrix features count as uncorrelated
        x = torch.randn(6, 5000, 40, generator=torch.Generator().manual_seed(2))
    outputs = (x @ weight.T).flatten(0, 1).double()
    found = gathered(x, needs).through(weight)
    tolerance = 1e-4 if needs == "gram" else 0.05
    torch.testing.assert_close(found.norm.double(), outputs.norm(dim=0), rtol=tolerance, atol=0)
    if needs == "gram":
        torch.testing.assert_close(found.gram.double(), outputs.T @ outputs, rtol=1e-4, atol=0.1)
    torch.testing.assert_close(found.mean.double(), outputs.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", ["moments", "gram"])
def test_some_of_the_features(x, needs):
    keep = torch.tensor([0, 3, 17, 39])
    kept, alone = gathered(x, needs).keep(keep), gathered(x[..., keep], needs)
    torch.testing.assert_close(kept.norm, alone.norm, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept.mean, alone.mean)
    if needs == "gram":
        torch.testing.assert_close(kept.gram, alone.gram, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("needs", ["moments", "gram"])
def test_changed_inputs_have_the_statistic_of_what_they_became(x, needs):
    factors = torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.5
    for change in (factors, torch.tensor([3, 17])):
        found, expected = gathered(x, needs).after(change), gathered(changed_inputs(x, change), needs)
        for name in ("norm", "mean", "mean_magnitude", "variance", "largest"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
        if needs == "gram":
            torch.testing.assert_close(found.gram, expected.gram, rtol=1e-5, atol=1e-3)
    assert changed_inputs(x, None) is x
    assert torch.equal(changed_inputs(x, torch.tensor([3, 17])), x[..., [3, 17]])


def test_an_input_that_is_not_finite_shows(x):
    statistic = gathered(x, "gram")
    x[0, 0, 7] = float("inf")
    statistic.add(x)
    assert not statistic.is_finite()
