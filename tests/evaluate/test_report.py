"""Reports as tables, Markdown, JSON and pictures."""

import json
import struct
from dataclasses import replace

import pytest

from hf_llmkernel.evaluate import Report, write_report
from hf_llmkernel.evaluate.plot import PANELS, _spreads_meet, pareto_front, plot_reports
from hf_llmkernel.evaluate.report import columns, compare_cells, render_markdown, render_reports
from hf_llmkernel.evaluate.table import count, markdown_table, size, text_table

DENSE = Report(
    model="dense",
    parameters=134_515_008,
    dense_parameters=134_515_008,
    bytes_on_disk=269_060_552,
    perplexity=25.0,
    perplexity_standard_error=1.5,
    context_length=1024,
    tokens_evaluated=8192,
    windows=8,
    windows_digest="0123",
    window_nlls=[3.2] * 8,
    text="bbc",
    evaluation_share=0.1,
    seed=0,
    dtype="float32",
    decode_tokens_per_second=20.0,
    decode_spread={"slowest": 19.0, "fastest": 21.0, "samples": 3, "held_back": 0},
    prefill_tokens_per_second=500.0,
    prefill_spread={"slowest": 480.0, "fastest": 510.0, "samples": 3, "held_back": 0},
    peak_memory_bytes=1_200_000_000,
    library_memory_bytes=330_000_000,
    load_seconds=1.0,
    sample={"prompt": "Why?", "text": "Because.\n\nOf | light.", "chat": True},
    settings={"repeats": 3, "prefill_tokens": 512, "prompt_tokens": 32, "new_tokens": 32},
    machine={"cpu": "A processor", "instructions": "AVX2", "threads": 2, "system": "Linux x86_64"},
    versions={"python": "3.11", "torch": "2.13"},
)
SMALL = replace(
    DENSE,
    model="small",
    parameters=100_000_000,
    bytes_on_disk=134_530_276,
    perplexity=30.0,
    decode_tokens_per_second=10.0,
    baseline=DENSE,
    baseline_perplexity=25.0,
    perplexity_ratio=1.2,
    perplexity_ratio_standard_error=0.03,
)


def test_quantities_as_people_read_them():
    assert [count(value) for value in (7, 1234, 134_515_008, 70.6e9)] == ["7", "1.23 k", "134.5 M", "70.6 B"]
    assert [size(value) for value in (512, 269_060_552, 4.2e9)] == ["512 B", "269.1 MB", "4.20 GB"]


def test_tables():
    assert text_table(["", "a"], [["row", "1.0"], ["longer", "12"]], "lr").splitlines() == [
        "          a",
        "------  ---",
        "row     1.0",
        "longer   12",
    ]
    assert markdown_table(["", "a"], [["x|y", "1"]], "lr") == "|  | a |\n| --- | ---: |\n| x\\|y | 1 |"


def test_two_reports_stand_side_by_side_with_the_change():
    header, rows = compare_cells(columns(SMALL))
    assert header == ["", "dense", "small", "change"]
    cells = {row[0].split(" (")[0]: row[1:] for row in rows}
    assert cells["bytes on disk"] == ["269.1 MB", "134.5 MB", "×0.50"]
    assert cells["perplexity"] == ["25.00 ± 1.50", "30.00 ± 1.50", "×1.20 ± 0.03"]
    assert cells["decode, tokens/s"] == ["20.0 (19.0-21.0)", "10.0 (19.0-21.0)", "×0.50"]
    assert "perplexity (bbc, 8192 tokens, context 1024, fp32)" in [row[0] for row in rows]


def test_several_models_stand_after_their_baseline_with_their_ratios():
    shown = columns([SMALL, replace(SMALL, model="other", perplexity_ratio=1.5, perplexity_ratio_standard_error=None)])
    header, rows = compare_cells(shown)
    assert header == ["", "dense", "small", "other"]
    assert rows[-1] == ["perplexity against the baseline", "-", "×1.20 ± 0.03", "×1.50"]


def test_what_was_not_measured_has_no_row_and_a_reason():
    bare = Report("bare", 10, 10, 40, reasons={"perplexity": "no evaluation text was given"})
    _, rows = compare_cells([bare])
    assert [row[0] for row in rows] == ["parameters stored", "bytes on disk"]
    assert "bare: no perplexity: no evaluation text was given" in render_reports([bare])
    _, rows = compare_cells([DENSE, bare])
    assert ["-", "-"] in [row[2:] for row in rows]


def test_a_machine_that_was_held_back_is_said():
    spread = {"slowest": 1.0, "fastest": 2.0, "samples": 3, "held_back": 2}
    text = render_reports([replace(DENSE, decode_spread=spread), SMALL])
    assert "dense: the machine was held back during 2 decode samples" in text
    assert "small: the machine" not in text


def test_small_errors_get_more_digits():
    _, rows = compare_cells([DENSE, replace(SMALL, perplexity_ratio_standard_error=0.0012)])
    assert "×1.2000 ± 0.0012" in [row[-1] for row in rows]


def test_markdown_holds_table_samples_and_method():
    text = render_markdown(columns(SMALL), "report.png")
    assert text.startswith("# small against dense\n\n|  | dense | small | change |\n")
    assert "![The figures of the table as bars](report.png)" in text
    assert "## What small writes" in text and "> Because.\n>\n> Of | light." in text
    for part in ("8 windows of 1024 tokens", "share 0.1, seed 0", "A processor (AVX2), 2 threads", "torch 2.13"):
        assert part in text
    assert render_markdown([DENSE] * 3).startswith("# 3 models compared")


def test_files_of_a_report_and_back(tmp_path):
    files = write_report(SMALL, tmp_path)
    assert [path.name for path in files] == ["report.json", "report.md", "report.png"]
    values = json.loads((tmp_path / "report.json").read_text())
    for key in (
        "parameters", "bytes_on_disk", "perplexity", "baseline_perplexity", "context_length", "tokens_evaluated",
        "decode_tokens_per_second", "prefill_tokens_per_second", "peak_memory_bytes", "sample", "machine", "versions",
    ):  # fmt: skip
        assert values[key] is not None
    assert Report.from_dict(values) == SMALL
    with pytest.raises(ValueError, match=r"unknown keys \['speed'\]"):
        Report.from_dict({**values, "speed": 1})


def test_json_has_null_for_what_is_not_finite(tmp_path):
    write_report(replace(DENSE, load_seconds=float("nan")), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["load_seconds"] is None


def test_several_reports(tmp_path):
    write_report([DENSE, SMALL, replace(SMALL, model="other")], tmp_path)
    assert [values["model"] for values in json.loads((tmp_path / "report.json").read_text())["models"]] == [
        "dense", "small", "other"
    ]  # fmt: skip


def png_size(path) -> tuple[int, int]:
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_a_picture_has_a_panel_for_each_quantity(tmp_path):
    wide, narrow, none = tmp_path / "wide.png", tmp_path / "narrow.png", tmp_path / "none.png"
    assert plot_reports([DENSE, SMALL], wide)
    assert plot_reports([replace(DENSE, perplexity=None), replace(SMALL, peak_memory_bytes=None)], narrow)
    assert png_size(wide)[0] > png_size(narrow)[0] > 400
    assert plot_reports([DENSE, SMALL, replace(SMALL, perplexity=99.0)], tmp_path / "front.png")
    assert plot_reports([replace(DENSE, perplexity=None)] * 3, tmp_path / "bars.png")
    assert not plot_reports([Report("empty", 0, 0, 0)], none)
    assert not none.exists()


def test_speeds_whose_spreads_meet_are_not_called_better_or_worse():
    decode = next(panel for panel in PANELS if panel.title == "Decode")
    near = replace(DENSE, decode_spread={"slowest": 20.5, "fastest": 23.0, "samples": 3, "held_back": 0})
    far = replace(DENSE, decode_spread={"slowest": 22.0, "fastest": 23.0, "samples": 3, "held_back": 0})
    assert _spreads_meet(decode, [DENSE, near])
    assert not _spreads_meet(decode, [DENSE, far])


def test_the_pareto_front():
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 5.0), (2.0, 3.0), (4.0, 2.0)]
    assert pareto_front(points) == [(1.0, 5.0), (2.0, 3.0), (3.0, 1.0)]
