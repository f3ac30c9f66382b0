"""The figures of reports as a picture: bars before and after, or what each of several models trades.

Reading order: which picture -> bars -> the trade-off of size and quality -> axes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import Report
from .table import size

BEFORE, AFTER = "#9aa5b1", "#2563a8"
BETTER, WORSE, INK, MUTED, RULE = "#1a7f4b", "#b3421f", "#2b2f36", "#5b6470", "#c9ced6"


@dataclass(frozen=True)
class Panel:
    """One quantity: its value, the interval around it, how a value is written, and whether less of it is better."""

    title: str
    unit: str
    value: Callable[[Report], float | None]
    interval: Callable[[Report], tuple[float, float] | None]
    text: Callable[[float], str]
    less_is_better: bool


def plot_reports(reports: Sequence[Report], path: Path) -> bool:
    """Draws one or two reports as bars, more as size against perplexity with their speeds beside it.

    Returns:
        Whether there was anything to draw; `path` is written only then.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [panel for panel in PANELS if all(panel.value(report) is not None for report in reports)]
    if not shown:
        return False
    figure = Figure(facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    if len(reports) > 2:
        _draw_trade(figure, reports, shown)
    else:
        _draw_bars(figure, reports, shown)
    figure.savefig(path, dpi=160)
    return True


def _spread(values: dict[str, Any] | None) -> tuple[float, float] | None:
    return None if values is None else (values["slowest"], values["fastest"])


def _standard_error(report: Report) -> tuple[float, float] | None:
    error = report.perplexity_standard_error
    if report.perplexity is None or error is None:
        return None
    return report.perplexity - error, report.perplexity + error


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


PANELS = (
    Panel("On disk", "weight files", lambda r: r.bytes_on_disk or None, lambda r: None, size, True),
    Panel("Perplexity", "± standard error", lambda r: r.perplexity, _standard_error, lambda v: f"{v:.2f}", True),
    Panel(
        "Decode",
        "tokens/s, batch 1",
        lambda r: r.decode_tokens_per_second,
        lambda r: _spread(r.decode_spread),
        _digits,
        False,
    ),
    Panel(
        "Prefill",
        "tokens/s",
        lambda r: r.prefill_tokens_per_second,
        lambda r: _spread(r.prefill_spread),
        _digits,
        False,
    ),
    Panel("Peak memory", "while it runs", lambda r: r.peak_memory_bytes, lambda r: None, size, True),
)


def _draw_bars(figure: Any, reports: Sequence[Report], panels: Sequence[Panel]) -> None:
    figure.set_size_inches(2.3 * len(panels) + 0.3, 3.9)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    colors = [BEFORE, AFTER][-len(reports) :]
    for axes, panel in zip(grid, panels, strict=True):
        bars = axes.bar(range(len(reports)), [panel.value(report) for report in reports], width=0.66, color=colors)
        _mark_intervals(axes, panel, reports)
        _label_bars(axes, panel, reports)
        axes.set_xlim(-0.6, len(reports) - 0.4)
        _strip(axes)
        axes.set_yticks([])
        axes.set_xticks([])
        _title(axes, panel, reports)
    figure.legend(
        list(bars),
        [report.model for report in reports],
        loc="outside lower center",
        ncols=len(reports),
        frameon=False,
        fontsize=10,
    )
    figure.suptitle(_conditions(reports[-1]), fontsize=9, color=MUTED)


def _mark_intervals(axes: Any, panel: Panel, reports: Sequence[Report]) -> None:
    for index, report in enumerate(reports):
        if (interval := panel.interval(report)) is not None:
            axes.vlines(index, *interval, color=INK, linewidth=1.1)
            axes.hlines(interval, index - 0.07, index + 0.07, color=INK, linewidth=1.1)


def _label_bars(axes: Any, panel: Panel, reports: Sequence[Report]) -> None:
    tops = [max(panel.value(report) or 0, *(panel.interval(report) or (0,))) for report in reports]
    for index, (report, top) in enumerate(zip(reports, tops, strict=True)):
        text = panel.text(panel.value(report) or 0)
        axes.annotate(text, (index, top), (0, 3), textcoords="offset points", ha="center", fontsize=10, color=INK)
    axes.set_ylim(0, max(tops) * 1.16)


def _title(axes: Any, panel: Panel, reports: Sequence[Report]) -> None:
    axes.set_title(f"{panel.title}\n", fontsize=12, fontweight="bold", color=INK)
    axes.text(0.5, 1.03, panel.unit, transform=axes.transAxes, ha="center", fontsize=9.5, color=MUTED)
    if len(reports) == 2:
        ratio = (panel.value(reports[1]) or 0) / (panel.value(reports[0]) or 1)
        same = abs(ratio - 1) < 0.02 or _spreads_meet(panel, reports)
        better = (ratio < 1) == panel.less_is_better
        color = MUTED if same else BETTER if better else WORSE
        axes.set_xlabel(f"×{ratio:.2f}", fontsize=12, fontweight="bold", color=color)


def _spreads_meet(panel: Panel, reports: Sequence[Report]) -> bool:
    """Whether two speeds could be the same by their samples. Perplexities are on the same windows: theirs could not."""
    if panel.title == "Perplexity":
        return False
    first, second = (panel.interval(report) for report in reports)
    return first is not None and second is not None and first[0] <= second[1] and second[0] <= first[1]


def _conditions(report: Report) -> str:
    parts = []
    if report.perplexity is not None:
        parts.append(
            f"perplexity on {report.tokens_evaluated:,} tokens of {report.text}, context {report.context_length}, fp32"
        )
    if report.dtype is not None:
        parts.append(f"speed and memory in {report.dtype} on {report.machine.get('threads')} threads")
    return "; ".join(parts)


def _draw_trade(figure: Any, reports: Sequence[Report], panels: Sequence[Panel]) -> None:
    has_quality = any(panel.title == "Perplexity" for panel in panels)
    bars = [panel for panel in panels if panel.title != "Perplexity" and not (has_quality and panel.title == "On disk")]
    figure.set_size_inches(6.0 * has_quality + 2.5 * len(bars) + 1.8, 1.8 + 0.45 * max(len(reports), 6))
    widths = [2.4] * has_quality + [1.0] * len(bars)
    grid = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    if has_quality:
        _draw_front(grid[0], reports)
    for index, (axes, panel) in enumerate(zip(grid[has_quality:], bars, strict=True)):
        _draw_side_bars(axes, panel, reports, named=index == 0)
    figure.suptitle(_conditions(reports[-1]), fontsize=9, color=MUTED)


def _draw_side_bars(axes: Any, panel: Panel, reports: Sequence[Report], named: bool) -> None:
    values = [panel.value(report) or 0 for report in reports]
    axes.barh(range(len(reports)), values, height=0.62, color=AFTER)
    for index, value in enumerate(values):
        place = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": INK}
        axes.annotate(panel.text(value), (value, index), (4, 0), **place)
    axes.set_yticks(range(len(reports)), [report.model if named else "" for report in reports], fontsize=9)
    axes.tick_params(left=False)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.35)
    axes.set_xticks([])
    axes.set_title(panel.title, fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(panel.unit, fontsize=9, color=MUTED)
    _strip(axes)


def _draw_front(axes: Any, reports: Sequence[Report]) -> None:
    """Bytes on disk against perplexity; the line joins the models that no other one beats in both."""
    points = [(report.bytes_on_disk, report.perplexity or 0.0, report) for report in reports]
    front = pareto_front([(x, y) for x, y, _ in points])
    axes.plot(*zip(*front, strict=True), color=AFTER, linewidth=1.2, alpha=0.5, zorder=1)
    middle = (min(x for x, _, _ in points) + max(x for x, _, _ in points)) / 2
    for x, y, report in points:
        axes.scatter(x, y, s=46, color=AFTER if (x, y) in front else BEFORE, zorder=2)
        shift, side = ((7, 6), "left") if x <= middle else ((-7, -14), "right")  # inside the frame, off the line
        axes.annotate(report.model, (x, y), shift, textcoords="offset points", ha=side, fontsize=9, color=INK)
    axes.set_xlabel("bytes on disk", color=INK)
    axes.set_ylabel("perplexity", color=INK)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: size(value).replace(".0 ", " "))
    axes.margins(0.15)
    axes.grid(alpha=0.25)
    title = "Size against quality (grey: another is smaller and better)"
    axes.set_title(title, fontsize=11, fontweight="bold", color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one is at most as large as in both coordinates, by the first coordinate."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _strip(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
