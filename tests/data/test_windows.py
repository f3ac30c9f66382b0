"""Windows and calibration batches of a tokenizer that can be followed by eye: a token a character."""

import pytest
import torch

from hf_llmkernel.data import calibration_batches, token_windows


class Characters:
    """A token a character, and a begin token where special tokens are asked for."""

    def __init__(self):
        self.read = 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        self.read += len(text)
        return {"input_ids": ([1] if add_special_tokens else []) + [ord(character) for character in text]}


def text_of(row: torch.Tensor) -> str:
    return "".join(map(chr, row.tolist()))


def test_windows_follow_each_other_without_overlap_or_special_tokens():
    windows = token_windows(Characters(), ["abc", "defgh"], context=4, tokens=100)
    assert windows.dtype == torch.int64
    assert [text_of(row) for row in windows] == ["abc\n", "\ndef", "gh\n\n"]


def test_the_number_of_windows_is_that_of_the_tokens_rounded_down():
    for tokens, expected in ((4, 1), (7, 1), (8, 2), (11, 2)):
        assert token_windows(Characters(), ["abcdefghijklmnop"], context=4, tokens=tokens).shape == (expected, 4)


def test_no_more_is_tokenized_than_needed():
    tokenizer = Characters()
    token_windows(tokenizer, ["x" * 1_000_000, "y" * 100], context=8, tokens=16)
    assert tokenizer.read < 2000


def test_bad_windows_name_counts_and_remedy():
    with pytest.raises(ValueError, match=r"context=16: the text has 5 tokens in 1 documents.*lower context"):
        token_windows(Characters(), ["abc"], context=16, tokens=64)
    with pytest.raises(ValueError, match="tokens=8: is less than one window of context=16"):
        token_windows(Characters(), ["abc"], context=16, tokens=8)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        token_windows(Characters(), ["abc"], context=1)
    with pytest.raises(ValueError, match=r"vocab_size=100: the tokenizer made token 104.*own tokenizer"):
        token_windows(Characters(), ["abcdefgh"], context=4, tokens=8, vocab_size=100)


DOCUMENTS = [character * 20 for character in "abcdefghij"]


def test_calibration_batches_are_shuffled_by_seed_and_use_no_token_twice():
    batches = calibration_batches(Characters(), DOCUMENTS, samples=8, length=22, seed=5)
    assert batches.shape == (8, 22)
    assert torch.equal(batches, calibration_batches(Characters(), DOCUMENTS, samples=8, length=22, seed=5))
    assert not torch.equal(batches, calibration_batches(Characters(), DOCUMENTS, samples=8, length=22, seed=6))
    rows = [text_of(row) for row in batches]
    assert len(set(rows)) == 8 and all(row == row[0] * 20 + "\n\n" for row in rows)
    assert rows != sorted(rows)


def test_calibration_needs_enough_text():
    with pytest.raises(ValueError, match=r"need 230 tokens, the text has 220; lower either"):
        calibration_batches(Characters(), DOCUMENTS, samples=10, length=23)
    with pytest.raises(ValueError, match="at least 1"):
        calibration_batches(Characters(), DOCUMENTS, samples=0)
    with pytest.raises(ValueError, match="vocab_size=50"):
        calibration_batches(Characters(), DOCUMENTS, samples=1, length=4, vocab_size=50)
