"""The report of a measured model, and its three files: `report.json`, `report.md` and `report.png`.

Reading order: the report -> the rows of a table -> Markdown -> the files.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .table import count, markdown_table, size, text_table


@dataclass(frozen=True)
class Report:
    """What one model is and costs, and how that was measured.

    A quantity that was not measured is `None`, with the reason under its name in `reasons`.

    Args:
        model: name of the model.
        parameters, dense_parameters, bytes_on_disk: of its inventory.
        perplexity, perplexity_standard_error: on `windows` windows of `context_length` tokens, `tokens_evaluated` in
            all, in fp32; `window_nlls` are their mean losses; reports of one `windows_digest` had the same windows.
        baseline_perplexity, perplexity_ratio, perplexity_ratio_standard_error: of `baseline`, on the same windows; the
            error is of the window-by-window difference, much smaller than that of either perplexity.
        text, evaluation_share, seed: the source, the share of its documents that is withheld, and the split's seed.
        dtype: in which speed and memory were measured.
        decode_tokens_per_second, prefill_tokens_per_second: medians; `..._spread` are the slowest and fastest of the
            samples, their number, and how many were left out because the machine was held back.
        peak_memory_bytes: most resident memory of a process that loads the model, prefills and decodes;
            `library_memory_bytes` of these before it loaded the model.
        sample: a greedy text: `prompt`, `text`, and whether it was a `chat` turn.
        settings: lengths and repeats of the speed measurement.
        machine, versions: what it ran on.
        reasons: why a quantity is `None`.
        baseline: the report of what the model is compared with.
    """

    model: str
    parameters: int
    dense_parameters: int
    bytes_on_disk: int
    perplexity: float | None = None
    perplexity_standard_error: float | None = None
    baseline_perplexity: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_standard_error: float | None = None
    context_length: int | None = None
    tokens_evaluated: int | None = None
    windows: int | None = None
    windows_digest: str | None = None
    window_nlls: list[float] = field(default_factory=list)
    text: str | None = None
    evaluation_share: float | None = None
    seed: int | None = None
    dtype: str | None = None
    decode_tokens_per_second: float | None = None
    decode_spread: dict[str, Any] | None = None
    prefill_tokens_per_second: float | None = None
    prefill_spread: dict[str, Any] | None = None
    peak_memory_bytes: int | None = None
    library_memory_bytes: int | None = None
    load_seconds: float | None = None
    sample: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    baseline: "Report | None" = None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object, the baseline's nested in it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        """The report of a JSON object. Raises `ValueError` on an unknown key, naming it."""
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"report: unknown keys {unknown}; it was written by another version, measure again.")
        baseline = values.get("baseline")
        return cls(**{**values, "baseline": None if baseline is None else cls.from_dict(baseline)})


@dataclass(frozen=True)
class Row:
    """One quantity of the tables: its title, its value in a report, that as text, and the error of its change."""

    title: str
    value: Callable[[Report], float | None]
    text: Callable[[Report], str]
    change_error: Callable[[Report], float | None] = lambda report: None


def table_rows(report: Report) -> list[Row]:
    """The quantities of a table, those of `report` that were measured; titles name the conditions."""
    rows = [
        Row("parameters stored", lambda r: r.parameters, lambda r: count(r.parameters)),
        Row("bytes on disk", lambda r: r.bytes_on_disk, lambda r: size(r.bytes_on_disk)),
        Row(
            _quality_title(report),
            lambda r: r.perplexity,
            _perplexity_text,
            change_error=lambda r: r.perplexity_ratio_standard_error,
        ),
        Row(
            f"decode, tokens/s (batch 1, {report.dtype})",
            lambda r: r.decode_tokens_per_second,
            lambda r: _rate_text(r.decode_tokens_per_second, r.decode_spread),
        ),
        Row(
            f"prefill, tokens/s ({report.settings.get('prefill_tokens')} tokens, {report.dtype})",
            lambda r: r.prefill_tokens_per_second,
            lambda r: _rate_text(r.prefill_tokens_per_second, r.prefill_spread),
        ),
        Row("peak memory (load, prefill, decode)", lambda r: r.peak_memory_bytes, _memory_text),
    ]
    return [row for row in rows if row.value(report) is not None]


def _quality_title(report: Report) -> str:
    return f"perplexity ({report.text}, {report.tokens_evaluated} tokens, context {report.context_length}, fp32)"


def _perplexity_text(report: Report) -> str:
    if report.perplexity is None:
        return "-"
    error = report.perplexity_standard_error
    return f"{report.perplexity:.2f}" + ("" if error is None else f" ± {error:.2f}")


def _rate_text(rate: float | None, spread: dict[str, Any] | None) -> str:
    if rate is None:
        return "-"
    digits = 0 if rate >= 100 else 1
    limits = "" if spread is None else f" ({spread['slowest']:.{digits}f}-{spread['fastest']:.{digits}f})"
    return f"{rate:.{digits}f}{limits}"


def _memory_text(report: Report) -> str:
    return "-" if report.peak_memory_bytes is None else size(report.peak_memory_bytes)


def compare_cells(reports: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of one or several reports; two get a column of the change from first to second."""
    header = ["", *(report.model for report in reports)]
    measured = {row.title: row for report in reports for row in table_rows(report)}
    if len(reports) > 2 and any(RATIO.value(report) is not None for report in reports):
        measured[RATIO.title] = RATIO
    rows = [[row.title, *(row.text(report) for report in reports)] for row in measured.values()]
    if len(reports) == 2:
        header.append("change")
        for cells, row in zip(rows, measured.values(), strict=True):
            cells.append(_change(row, *reports))
    return header, rows


def _ratio_text(report: Report) -> str:
    if report.perplexity_ratio is None:
        return "-"
    return _times(report.perplexity_ratio, report.perplexity_ratio_standard_error)


def _times(ratio: float, error: float | None) -> str:
    if error is None:
        return f"×{ratio:.2f}"
    digits = 2 if error >= 0.01 else 4
    return f"×{ratio:.{digits}f} ± {error:.{digits}f}"


RATIO = Row("perplexity against the baseline", lambda report: report.perplexity_ratio, _ratio_text)


def _change(row: Row, before: Report, after: Report) -> str:
    first, second = row.value(before), row.value(after)
    if not first or second is None:
        return "-"
    return _times(second / first, row.change_error(after))


def render_reports(reports: Sequence[Report]) -> str:
    """The table, the samples, and why something is missing, as text."""
    header, rows = compare_cells(reports)
    parts = [text_table(header, rows, "l" + "r" * (len(header) - 1)), *map(_sample_text, reports), *_notes(reports)]
    return "\n\n".join(part for part in parts if part)


def _sample_text(report: Report) -> str:
    if report.sample is None:
        return ""
    return f"{report.model}, asked {report.sample['prompt']!r}:\n{report.sample['text'].strip()}"


def _notes(reports: Sequence[Report]) -> list[str]:
    """Why something is missing or uncertain, a line a model and reason."""
    lines = []
    for report in reports:
        if held_back := _held_back(report):
            lines.append(f"{report.model}: {held_back}")
        for reason in dict.fromkeys(report.reasons.values()):
            missing = [name for name, given in report.reasons.items() if given == reason]
            lines.append(f"{report.model}: no {', '.join(missing)}: {reason}")
    return ["\n".join(lines)] if lines else []


def _held_back(report: Report) -> str:
    """Whether the machine was held back while speed was measured, as a note; empty where it was not."""
    spreads = {"decode": report.decode_spread, "prefill": report.prefill_spread}
    counts = [f"{spread['held_back']} {kind}" for kind, spread in spreads.items() if spread and spread["held_back"]]
    if not counts:
        return ""
    return f"the machine was held back during {' and '.join(counts)} samples: measure again when it is idle"


def render_markdown(reports: Sequence[Report], plot: str | None = None) -> str:
    """The report as Markdown: table, plot, samples, and how it was measured."""
    header, rows = compare_cells(reports)
    parts = [
        f"# {_heading(reports)}",
        markdown_table(header, rows, "l" + "r" * (len(header) - 1)),
        f"![The figures of the table as bars]({plot})" if plot else "",
        *(_markdown_sample(report) for report in reports),
        "## How it was measured",
        _method(reports[-1]),
        *(f"- {note}" for notes in _notes(reports) for note in notes.splitlines()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(reports: Sequence[Report]) -> str:
    names = [report.model for report in reports]
    return {1: names[0], 2: f"{names[-1]} against {names[0]}"}.get(len(names), f"{len(names)} models compared")


def _markdown_sample(report: Report) -> str:
    if report.sample is None:
        return ""
    quoted = "\n".join(f"> {line}".rstrip() for line in report.sample["text"].strip().splitlines())
    return f"## What {report.model} writes\n\nGreedy, asked \"{report.sample['prompt']}\":\n\n{quoted}"


def _method(report: Report) -> str:
    sentences = []
    if report.perplexity is not None:
        sentences.append(
            f"Perplexity: {report.windows} windows of {report.context_length} tokens that do not overlap "
            f"({report.tokens_evaluated} tokens), fp32, from the part of `{report.text}` that is withheld from "
            f"calibration (share {report.evaluation_share:g}, seed {report.seed}); ± is one standard error, that of "
            "the change from the differences window by window."
        )
    if report.decode_tokens_per_second is not None:
        settings = report.settings
        sentences.append(
            f"Speed: medians (slowest-fastest) of {settings['repeats']} or more rounds, the models in turns, each in a "
            f"clean process; prefill of {settings['prefill_tokens']} tokens, {settings['new_tokens']} tokens of greedy "
            f"`generate` after a prompt of {settings['prompt_tokens']}, batch 1, {report.dtype}. Peak memory is that "
            f"of the process, of which {size(report.library_memory_bytes or 0)} are Python and its libraries."
        )
    machine = report.machine
    sentences.append(
        f"Machine: {machine.get('cpu')} ({machine.get('instructions')}), {machine.get('threads')} threads, "
        f"{machine.get('system')}. " + ", ".join(f"{name} {version}" for name, version in report.versions.items()) + "."
    )
    return "\n\n".join(sentences)


def write_report(reports: Report | Sequence[Report], folder: str | Path) -> list[Path]:
    """Writes `report.json`, `report.md` and, where something was measured that can be drawn, `report.png`.

    Args:
        reports: one report (its baseline stands beside it in table and plot), or several to compare.
        folder: exists; use `output_folder` where it must appear whole.

    Returns:
        The files.
    """
    from .plot import plot_reports

    folder = Path(folder)
    shown = columns(reports)
    content = reports.to_dict() if isinstance(reports, Report) else {"models": [report.to_dict() for report in reports]}
    files = [folder / "report.json", folder / "report.md"]
    if plot_reports(shown, folder / "report.png"):
        files.append(folder / "report.png")
    files[0].write_text(json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    files[1].write_text(render_markdown(shown, "report.png" if len(files) == 3 else None), encoding="utf-8")
    return files


def columns(reports: Report | Sequence[Report]) -> list[Report]:
    """The reports of a table: their baseline, where they have one, comes first."""
    shown = [reports] if isinstance(reports, Report) else list(reports)
    baseline = shown[0].baseline if shown else None
    return shown if baseline is None else [baseline, *shown]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
