"""The table of paths: what it measures, keeps and decides, by times that a test gives; and that both paths agree."""

import json
import time

import pytest
import torch
from transformers import DynamicCache

from hf_llmkernel.kernels import library, paths
from hf_llmkernel.kernels.paths import MARGIN, Paths

from .test_step import forms, prompt, random_model


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The table's file in a cache folder of its own, where it is in use."""
    monkeypatch.setenv("HF_LLMKERNEL_CACHE", str(tmp_path))
    monkeypatch.delenv("LLMKERNEL_PATHS")
    return tmp_path / "paths.json"


@pytest.fixture
def measured(cache, monkeypatch):
    """Measurements asked for; the kernels take 2 us a row, torch 5 us whatever the rows."""
    calls: list[tuple[int, int, int]] = []

    def measure(kind: int, side: int, rows: int) -> tuple[float, float]:
        calls.append((kind, side, rows))
        return 2e-6 * rows, 5e-6

    monkeypatch.setattr(paths, "measure", measure)
    return calls


def test_an_entry_is_measured_once_and_kept(measured, cache):
    table = Paths()
    assert table.takes(library.INT4, 256, 256, 1) and not table.takes(library.INT4, 256, 256, 16)
    assert table.takes(library.INT4, 250, 270, 1)  # of about this size
    assert measured == [(library.INT4, 256, 1), (library.INT4, 256, 16)]
    assert Paths().takes(library.INT4, 256, 256, 1) and len(measured) == 2  # another process
    (kept,) = json.loads(cache.read_text()).values()
    assert kept == {f"{library.INT4} 256 1": [2e-6, 5e-6], f"{library.INT4} 256 16": [3.2e-5, 5e-6]}


def test_what_others_have_kept_stays(measured, cache):
    one, other = Paths(), Paths()
    one.takes(library.INT8, 256, 256, 1)
    other.takes(library.BF16, 1024, 1024, 64)
    (kept,) = json.loads(cache.read_text()).values()
    assert set(kept) == {f"{library.INT8} 256 1", f"{library.BF16} 1024 64"}


def test_instruction_sets_and_threads_have_entries_of_their_own(level, measured, cache, monkeypatch):
    table = Paths()
    for threads in ("1", "2"):
        monkeypatch.setenv("LLMKERNEL_THREADS", threads)
        table.takes(library.INT8, 256, 256, 1)
    assert len(measured) == 2
    assert all(f", {level}, " in key for key in json.loads(cache.read_text()))


NONE = ["", "[]", '{"a": 1}', "\\xff", '{"a": null}', '{"a": {"b": null}}']
NONE += [f'{{"a": {{"b": {entry}}}}}' for entry in ("[1]", "[0, 1]", "[null, 1]", '["1", 1]', "[true, 1]", "[1, NaN]")]


@pytest.mark.parametrize("content", NONE)
def test_a_file_that_is_none_is_made_anew(measured, cache, content):
    cache.write_text(content)
    assert Paths().takes(library.INT8, 256, 256, 1)
    assert len(json.loads(cache.read_text())) == 1


def test_a_folder_in_the_place_of_the_file_is_left_alone(measured, cache):
    cache.mkdir()
    table = Paths()
    assert table.takes(library.INT8, 256, 256, 1) and table.takes(library.INT8, 256, 256, 1)
    assert len(measured) == 1 and list(cache.parent.iterdir()) == [cache]


def test_where_nothing_can_be_written_this_process_knows(measured, cache, monkeypatch):
    (cache.parent / "file").write_text("")
    monkeypatch.setenv("HF_LLMKERNEL_CACHE", str(cache.parent / "file" / "below"))
    table = Paths()
    assert table.takes(library.INT8, 256, 256, 1) and table.takes(library.INT8, 256, 256, 1)
    assert len(measured) == 1


@pytest.mark.parametrize(("native", "taken"), [(MARGIN * 0.99, True), (MARGIN * 1.01, False)])
def test_torch_is_taken_where_it_is_clearly_faster(cache, monkeypatch, native, taken):
    monkeypatch.setattr(paths, "measure", lambda *_: (native, 1.0))
    assert Paths().takes(library.INT8, 256, 256, 1) is taken
    assert Paths().takes_step([(library.INT8, 65536)] * 3, 2, 1) is taken


def test_operations_around_the_products_count_for_a_whole_step(measured, cache):
    table = Paths()
    assert not table.takes(library.INT8, 256, 256, 64)
    assert table.takes_step([(library.INT8, 65536)], 1, 64)


def test_without_the_table_all_is_native(measured, monkeypatch):
    monkeypatch.setenv("LLMKERNEL_PATHS", "native")
    assert Paths().takes(library.INT4, 256, 256, 256) and Paths().takes_step([], 1, 1)
    assert measured == []


@pytest.mark.parametrize("kind", [library.F32, library.BF16, *paths.FORMS])
def test_both_products_are_of_the_same_matrix(level, kind):
    if kind == library.SPARSE_BF16 and level != "avx512":
        pytest.skip("no kernel of this kind, and torch takes it without being asked")
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if kind == library.F32 else torch.bfloat16
    x, weight = (torch.randn(rows, 96, generator=generator).to(dtype) for rows in (3, 96))
    native, plain = (product() for product in paths._products(kind, x, weight))
    assert (native - plain).norm() < 0.02 * plain.norm()


def test_a_measurement_takes_the_best_of_some_turns(level, cache):
    seconds = paths.measure(library.INT8, 256, 4)
    assert all(0 < each < 1 for each in seconds)


@pytest.mark.parametrize(("held_up", "calls"), [(0, 6), (9, 9), (99, 31)])
def test_torch_is_believed_after_many_turns(held_up, calls):
    """A machine with much else to do holds up the kernels' threads, for a while."""
    seen = []

    def native() -> None:
        seen.append(len(seen))
        time.sleep(4e-3 if len(seen) < held_up else 5e-4)

    seconds = paths._best_seconds(native, lambda: time.sleep(1e-3))
    assert len(seen) == calls and (seconds[0] > MARGIN * seconds[1]) == (calls == 31)


def test_a_model_goes_through_torch_where_that_is_faster(cache, monkeypatch, native_calls):
    monkeypatch.setattr(paths, "PATHS", table := Paths())
    monkeypatch.setattr("hf_llmkernel.kernels.step.PATHS", table)
    monkeypatch.setattr("hf_llmkernel.kernels.dispatch.PATHS", table)
    monkeypatch.setattr(paths, "measure", lambda kind, side, rows: (1.0, 1.0) if rows == 1 else (1e9, 1.0))
    model, ids = random_model(**forms(bits=8)), prompt(2, 9)
    cache_of_model = DynamicCache(config=model.config)
    model(ids, past_key_values=cache_of_model, use_cache=True)
    assert native_calls == [] and cache_of_model.get_seq_length() == 9
    model(ids[:1, :1], past_key_values=DynamicCache(config=model.config), use_cache=True)
    model(ids[:1, :8], past_key_values=DynamicCache(config=model.config), use_cache=True)
    assert native_calls == [1, 1]
