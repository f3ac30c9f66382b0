"""Stop strings against the plain search in the whole text."""

import random

import pytest

from hf_llmkernel.generate.stop import StopStrings, cut


def test_nothing_is_shown_that_a_stop_string_may_begin_in():
    stop = StopStrings(["END"])
    assert [stop.feed(piece) for piece in ("aE", "N", "x", "EN", "D more", "later")] == ["a", "", "ENx", "", "", ""]
    assert stop.found and stop.rest() == ""
    open_end = StopStrings(["END"])
    assert open_end.feed("a EN") == "a " and open_end.rest() == "EN" and not open_end.found


def test_without_stop_strings_all_is_shown_at_once():
    stop = StopStrings([])
    assert stop.feed("a") == "a" and stop.rest() == "" and not stop.found


@pytest.mark.parametrize("seed", range(30))
def test_pieces_give_what_the_whole_text_gives(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(40))
    strings = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
    stop, shown, place = StopStrings(strings), "", 0
    while place < len(text) and not stop.found:
        length = rng.randint(1, 5)
        shown += stop.feed(text[place : place + length])
        place += length
    expected = cut(text, strings)
    assert stop.found == (expected != text)
    if stop.found:
        assert shown == cut(text[:place], strings)
    else:
        assert shown + stop.rest() == text
