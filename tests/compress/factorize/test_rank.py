"""Ranks against exhaustive searches."""

import itertools

import pytest
import torch

from hf_llmkernel.compress.factorize.rank import (
    allocate_ranks,
    break_even_rank,
    rank_for_energy,
    rank_for_ratio,
)

SHAPES = [(576, 576), (1536, 576), (576, 1536), (192, 576), (7, 3), (1, 1), (2048, 5632)]


@pytest.mark.parametrize("shape", SHAPES)
def test_break_even_is_the_last_rank_that_saves(shape):
    dense = shape[0] * shape[1]
    saving = [rank for rank in range(1, min(shape) + 1) if rank * sum(shape) < dense]
    assert break_even_rank(*shape) == max(saving, default=0)


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.37, 0.5, 0.99])
@pytest.mark.parametrize("align", [1, 16, 64])
def test_no_other_multiple_that_saves_comes_nearer_to_the_ratio(shape, ratio, align):
    dense = shape[0] * shape[1]
    legal = [rank for rank in range(align, min(shape) + 1, align) if rank * sum(shape) < dense]
    distances = {rank: abs(rank * sum(shape) - (1 - ratio) * dense) for rank in legal}
    rank = rank_for_ratio(shape[0], shape[1], ratio, align)
    assert distances[rank] == pytest.approx(min(distances.values()), abs=1e-6)


def test_of_two_ranks_equally_near_the_smaller():
    assert rank_for_ratio(64, 64, 0.25, align=16) == 16  # 24 lies between 16 and 32, which would not save


def test_an_alignment_above_break_even_is_refused():
    with pytest.raises(ValueError, match="align=64: .*96 x 96 .*break-even is 47"):
        rank_for_ratio(96, 96, 0.5, align=64)


@pytest.mark.parametrize(
    ("energy", "expected"), [(0.3, 4), (0.5, 4), (0.51, 8), (0.75, 8), (0.8, 12), (0.875, 12), (0.9, None), (1.0, None)]
)
def test_the_smallest_rank_that_keeps_the_energy(energy, expected):
    """Ranks 4, 8, 12 keep 1/2, 3/4, 7/8; 16 would keep 15/16, but does not save parameters of 32 x 32."""
    spectrum = torch.tensor([8.0, 4, 2, 1, 1, 0, 0, 0]).repeat_interleave(4)
    assert rank_for_energy(spectrum, 32, 32, energy, align=4) == expected


def spectra(shapes, seed=0):
    """Spectra that fall at different rates, of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    decays = torch.rand(len(shapes), generator=generator).tolist()
    return [
        10 ** float(torch.randn(1, generator=generator)) * torch.exp(-decay * torch.arange(min(shape)).double())
        for shape, decay in zip(shapes, decays, strict=True)
    ]


def outcome(ranks, of_spectra, shapes):
    """Loss and parameters of an allocation."""
    loss, parameters = 0.0, 0
    for rank, spectrum, (rows, columns) in zip(ranks, of_spectra, shapes, strict=True):
        loss += 0 if rank is None else float(spectrum[rank:].sum())
        parameters += rows * columns if rank is None else rank * (rows + columns)
    return loss, parameters


TINY = [(16, 16), (24, 8), (12, 20), (16, 32)]


@pytest.mark.parametrize("seed", range(4))
def test_an_allocation_is_as_good_as_the_best_at_a_step_less(seed):
    of_spectra = spectra(TINY, seed)
    options = [
        [rank for rank in range(2, min(shape), 2) if rank * sum(shape) < shape[0] * shape[1]] + [None] for shape in TINY
    ]
    every = [outcome(ranks, of_spectra, TINY) for ranks in itertools.product(*options)]
    smallest = min(parameters for _, parameters in every)
    dense = sum(rows * columns for rows, columns in TINY)
    for budget in range(smallest, dense + 1, 97):
        loss, parameters = outcome(allocate_ranks(of_spectra, TINY, budget, align=2), of_spectra, TINY)
        assert parameters <= budget
        # greedy misses the best only by its last steps, none of which here takes 200 parameters
        best_of_less = min(loss for loss, spent in every if spent <= max(smallest, budget - 200))
        assert loss <= best_of_less + 1e-12


def test_nothing_that_fits_is_left_unbought():
    of_spectra = spectra(TINY)
    budget = 900
    ranks = allocate_ranks(of_spectra, TINY, budget, align=2)
    for index, (rank, (rows, columns)) in enumerate(zip(ranks, TINY, strict=True)):
        if rank is None:
            continue
        larger = rank + 2 if (rank + 2) * (rows + columns) < rows * columns else None
        _, more = outcome([*ranks[:index], larger, *ranks[index + 1 :]], of_spectra, TINY)
        assert more > budget


def test_a_flat_spectrum_stays_dense_and_a_steep_one_pays_for_it():
    steep = torch.cat([torch.ones(8), torch.full((56,), 1e-6)])
    flat = torch.ones(64)
    budget = 64 * 64 + 16 * 128  # one dense, and more than the steep one's eight ranks
    assert allocate_ranks([steep, flat], [(64, 64), (64, 64)], budget, align=8) == [16, None]


def test_the_loss_of_a_rank_is_what_it_leaves_out():
    """One has 8 large values, the other 9 smaller ones: a rank of 16 helps the other alone."""
    eight, nine = torch.zeros(64), torch.zeros(64)
    eight[:8], nine[:9] = 1, 0.4
    assert allocate_ranks([eight, nine], [(64, 64)] * 2, 3 * 8 * 128, align=8) == [8, 16]


def test_a_step_counts_by_what_it_costs():
    """Two steps of 1,024 parameters that save 0.6 each, against one of 2,048 that saves 1."""
    small, large = torch.zeros(64), torch.zeros(64)
    small[:16], large[:16] = 0.6 / 8, 1 / 8
    shapes = [(64, 64), (64, 64), (64, 192)]
    budget = 8 * (128 + 128 + 256) + 2048
    assert allocate_ranks([small, small, large], shapes, budget, align=8) == [16, 16, 8]


def test_a_linear_that_no_rank_saves_stays_dense():
    assert allocate_ranks([torch.ones(8), torch.ones(64)], [(8, 8), (64, 64)], 64 + 1024, align=8) == [None, 8]


def test_the_whole_budget_leaves_all_dense():
    shapes = [(64, 64), (32, 96)]
    whole = 64 * 64 + 32 * 96
    assert allocate_ranks(spectra(shapes), shapes, whole, align=8) == [None, None]


def test_a_budget_below_the_smallest_ranks_is_refused():
    with pytest.raises(ValueError, match="budget_parameters=1000: below the 2048 "):
        allocate_ranks(spectra([(64, 64), (64, 64)]), [(64, 64), (64, 64)], 1000, align=8)
