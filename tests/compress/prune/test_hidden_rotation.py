"""A narrower stream against the formulas of norm and linear, in fp64."""

import pytest
import torch

from hf_llmkernel.compress.prune.hidden_rotation import (
    Rotation,
    Selection,
    alike_channels,
    balanced_scales,
    channel_scores,
    normalized,
    principal_directions,
)

H, K, EPS = 12, 8, 0.05  # an ε as large as the stream's own squares shows where it is left out


def norm(hidden, gain, eps=EPS):
    return gain * hidden / (hidden.square().mean(-1, keepdim=True) + eps).sqrt()


def cases():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(H, K, generator=generator, dtype=torch.float64)).Q
    channels = torch.tensor([0, 2, 3, 5, 6, 8, 10, 11])
    return {
        "rotation": (Rotation(directions), directions),
        "selection": (Selection(channels, H), torch.eye(H, dtype=torch.float64)[:, channels]),
    }


@pytest.mark.parametrize("kind", ["rotation", "selection"])
def test_a_stream_in_the_span_gives_the_same_outputs(kind):
    basis, span = cases()[kind]
    generator = torch.Generator().manual_seed(1)
    inner, gain, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(5, K), (H,), (K,)]
    )
    reads, writes = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(7, H), (K, 7)])
    hidden, writes, bias = 0.2 * inner @ span.T, span @ writes, span @ bias
    after = hidden + norm(hidden, gain) @ reads.T @ writes.T + bias
    expected = norm(after, gain) @ reads.T

    thin = basis.write(hidden.T).T
    thin = thin + norm(thin, basis.norm(gain)) @ basis.read(reads, gain).T @ basis.write(writes).T + basis.write(bias)
    assert thin.shape == (5, K)
    outputs = norm(thin, basis.norm(gain)) @ basis.read(reads, gain).T
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)


def test_a_rotation_leaves_norms_of_ones():
    basis, _ = cases()["rotation"]
    assert torch.equal(basis.norm(torch.randn(H)), torch.ones(K))


def test_principal_directions_are_those_of_the_singular_value_decomposition():
    generator = torch.Generator().manual_seed(0)
    rows, mix = (torch.randn(count, H, generator=generator, dtype=torch.float64) for count in (200, H))
    rows = rows @ mix
    directions, share, groups = principal_directions(rows.T @ rows, K)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    assert share == pytest.approx(float(values[:K].square().sum() / values.square().sum()), abs=1e-12)
    span = vectors[:K].T @ vectors[:K]
    torch.testing.assert_close((directions @ directions.T).double(), span, rtol=0, atol=1e-5)
    torch.testing.assert_close(directions.T @ directions, torch.eye(K), rtol=0, atol=1e-5)
    assert groups.tolist() == [0] * K


def test_directions_of_groups_are_the_best_that_do_not_mix_them():
    generator = torch.Generator().manual_seed(0)
    rows, mix = (torch.randn(count, H, generator=generator, dtype=torch.float64) for count in (200, H))
    rows = rows @ mix
    parts = [torch.tensor([0, 2, 5, 7, 11]), torch.tensor([1]), torch.tensor([3, 4, 6, 8, 9, 10])]
    directions, share, groups = principal_directions(rows.T @ rows, K, parts)
    torch.testing.assert_close(directions.T @ directions, torch.eye(K), rtol=0, atol=1e-5)
    for column, number in zip(directions.T, groups, strict=True):
        assert set(column.nonzero().flatten().tolist()) <= set(parts[number].tolist())
    energies = torch.cat([torch.linalg.svdvals(rows[:, part]).square() for part in parts]).sort(descending=True).values
    assert share == pytest.approx(float(energies[:K].sum() / energies.sum()), abs=1e-12)
    kept = (rows @ directions.double()).square().sum() / rows.square().sum()
    assert share == pytest.approx(float(kept), abs=1e-6)


def test_alike_channels_are_within_the_spread_of_a_median():
    gain = torch.tensor([1.0, -2.0, 1.2, 0.0, 0.9, 5.0, 1.3, 0.0, -2.1, 1.1])
    groups = alike_channels(gain, 0.25)
    assert [group.tolist() for group in groups] == [[0, 4, 9], [3, 7], [2, 6], [1, 8], [5]]


def test_balanced_scales_share_what_is_off():
    gain = torch.tensor([1.8, 2.2, 0.0, -3.0, 0.0])
    balance, means = balanced_scales(gain, [torch.tensor([0, 1]), torch.tensor([2, 4]), torch.tensor([3])])
    torch.testing.assert_close(means, torch.tensor([2.0, 0.0, -3.0]))
    torch.testing.assert_close(balance, torch.tensor([0.9**0.5, 1.1**0.5, 1, 1, 1]))


def test_normalized_has_a_root_mean_square_of_one():
    sizes = torch.tensor([1e-12, 1.0, 1e12, 3.0])[:, None]
    hidden = torch.randn(3, 4, H, generator=torch.Generator().manual_seed(0)) * sizes
    torch.testing.assert_close(normalized(hidden).square().mean(-1), torch.ones(3, 4), rtol=1e-5, atol=0)
    assert torch.equal(normalized(torch.zeros(2, H)), torch.zeros(2, H))


def test_channel_scores_are_mean_magnitudes_of_what_a_norm_puts_out():
    generator = torch.Generator().manual_seed(0)
    hidden, gain = torch.randn(50, H, generator=generator), torch.randn(H, generator=generator)
    scores = channel_scores(normalized(hidden).abs().mean(0), gain)
    naive = torch.stack([norm(row, gain, 0).abs() for row in hidden]).mean(0)
    torch.testing.assert_close(scores, naive, rtol=1e-5, atol=1e-6)
