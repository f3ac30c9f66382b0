"""Masks against sorting by hand, in exact counts, and against what a packed form has room for."""

import pytest
import torch

from hf_llmkernel.compress.sparsify.mask import check_sparsity, keep_highest, kept_per_row, select_mask
from hf_llmkernel.model.linear_llm_kernel import LinearForm, check_mask, pack_mask, pack_weight

SHAPES = [(6, 16), (5, 18), (3, 7), (1, 9)]


def scores_of(shape, ties):
    generator = torch.Generator().manual_seed(shape[1])
    if ties:
        return torch.randint(0, 3, shape, generator=generator).float()
    return torch.rand(shape, generator=generator)


def highest(scores, kept):
    """Indices of the highest of a list, of equal ones the first."""
    return set(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:kept])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_keeps_its_highest(shape, sparsity, ties):
    scores = scores_of(shape, ties)
    kept = kept_per_row(shape[1], sparsity)
    for row, mask in zip(scores.tolist(), select_mask(scores, sparsity), strict=True):
        assert set(mask.nonzero().flatten().tolist()) == highest(row, kept)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_keeps_its_highest(shape, sparsity, ties):
    scores = scores_of(shape, ties)
    mask = select_mask(scores, sparsity, scope="layer")
    kept = shape[0] * kept_per_row(shape[1], sparsity)
    assert set(mask.flatten().nonzero().flatten().tolist()) == highest(scores.flatten().tolist(), kept)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8", "1:2", "5:7", "4:17", "9:18"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_group_keeps_its_highest(shape, pattern, ties):
    kept, group = map(int, pattern.split(":"))
    scores = scores_of(shape, ties)
    mask = select_mask(scores, None, pattern)
    for row, row_mask in zip(scores.tolist(), mask, strict=True):
        for start in range(0, shape[1], group):
            chosen = set(row_mask[start : start + group].nonzero().flatten().tolist())
            assert chosen == highest(row[start : start + group], kept)  # of a short group, no more than there are


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_group_mask_is_one_that_the_stored_form_accepts(shape, pattern):
    scores, form = scores_of(shape, ties=False), LinearForm(sparsity=pattern)
    mask = select_mask(scores, None, pattern)
    check_mask(pack_mask(mask), form, shape[1])
    assert pack_weight(scores, form, mask)["values"].shape == form.values_shape(*shape)


def test_the_first_of_equal_scores_stay():
    assert select_mask(torch.zeros(2, 6), 0.5).tolist() == [[True] * 3 + [False] * 3] * 2
    assert select_mask(torch.zeros(2, 6), 0.5, scope="layer").tolist() == [[True] * 6, [False] * 6]
    assert select_mask(torch.zeros(1, 8), None, "2:4").tolist() == [[True, True, False, False] * 2]


def test_the_kept_weights_of_a_row_are_the_nearest_count():
    assert [kept_per_row(576, sparsity) for sparsity in (0.5, 0.7, 0.66)] == [288, 173, 196]


def test_nothing_and_everything_can_be_kept():
    scores = torch.rand(3, 5, generator=torch.Generator().manual_seed(3))
    assert not keep_highest(scores, 0).any()
    assert keep_highest(scores, 5).all()


def test_scores_in_another_memory_layout_are_read_the_same():
    scores = torch.rand(16, 12, generator=torch.Generator().manual_seed(4))
    for sparsity, pattern, scope in (
        (0.5, "unstructured", "row"),
        (0.5, "unstructured", "layer"),
        (None, "2:4", "row"),
    ):
        expected = select_mask(scores.T.contiguous(), sparsity, pattern, scope)
        assert torch.equal(select_mask(scores.T, sparsity, pattern, scope), expected)


def test_the_share_that_a_pattern_removes():
    assert check_sparsity(None, "1:4") == 0.75
    assert check_sparsity(0.75, "1:4") == 0.75
    assert check_sparsity(2 / 3, "1:3") == 2 / 3
    assert check_sparsity(0.3, "unstructured") == 0.3


@pytest.mark.parametrize(
    ("sparsity", "pattern", "message"),
    [
        (0, "unstructured", "sparsity=0: must be above 0"),
        (1.0, "unstructured", "sparsity=1.0: must be above 0 and below 1"),
        (None, "unstructured", "sparsity=None: must be above 0"),
        (True, "unstructured", "sparsity=True: must be above 0"),
        ("half", "unstructured", "sparsity='half': must be above 0"),
        (0.5, "1:4", "sparsity=0.5: pattern='1:4' removes 0.75; leave sparsity out"),
        (0.5, "4:2", "pattern='4:2': must be"),
        (0.5, "4:4", "pattern='4:4': must be"),
        (0.5, "0:4", "pattern='0:4': must be"),
        (0.5, "block", "pattern='block': must be"),
        (0.5, None, "pattern=None: must be"),
    ],
)
def test_sparsity_and_pattern_outside_their_range_are_refused(sparsity, pattern, message):
    with pytest.raises(ValueError, match=message):
        check_sparsity(sparsity, pattern)
    with pytest.raises(ValueError, match=message):
        select_mask(torch.ones(2, 8), sparsity, pattern)


def test_other_faults_are_named():
    with pytest.raises(ValueError, match="scope='column': must be one of"):
        select_mask(torch.ones(2, 8), 0.5, scope="column")
    with pytest.raises(ValueError, match="scores: .*not a number"):
        select_mask(torch.tensor([[1.0, float("nan"), 2.0, 0.0]]), 0.5)
