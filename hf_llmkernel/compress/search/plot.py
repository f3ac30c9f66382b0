"""A search as a picture: the front with the mix that was taken, and what every choice loses in every layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...evaluate.plot import AFTER, BEFORE, INK, MUTED, WORSE

BUDGET_UNITS = {"bytes": "bytes", "parameters": "stored values", "latency": "milliseconds a token"}
LEAST_LOSS = 1e-3  # nats a token: what is less, or below 0, is drawn as this


def plot_searches(stages: Sequence[dict[str, Any]], folder: Path) -> None:
    """Draws every search of a run's stages (`Compression.stages`): `front.png`, `front-2.png`, ..."""
    decisions = [stage["decision"] for stage in stages if "front" in stage.get("decision", {})]
    for number, decision in enumerate(decisions, 1):
        plot_search(decision, folder / ("front.png" if number == 1 else f"front-{number}.png"))


def plot_search(decision: dict[str, Any], path: Path) -> None:
    """Draws what `Search.decide` returns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    choices, layers = len(decision["choices"]), len(decision["table"])
    figure = Figure(facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_size_inches(10.5 + 0.08 * layers, max(4.2, 1.6 + 0.28 * choices))
    left, right = figure.subplots(1, 2, width_ratios=[1.0, 1.1])
    _draw_front(left, decision)
    _draw_table(figure, right, decision)
    figure.suptitle(
        f"losses measured on {decision['tokens']:,} calibration tokens, one layer at a time, and added up",
        fontsize=9,
        color=MUTED,
    )
    figure.savefig(path, dpi=160)


def _draw_front(axes: Any, decision: dict[str, Any]) -> None:
    """Cost against predicted loss: the front, every choice in all layers alike, and the mix that was taken."""
    present = decision["present"] / 100

    def place(point: dict[str, float]) -> tuple[float, float]:
        return point["cost"] / present, max(point["loss"], LEAST_LOSS)

    axes.plot(*zip(*map(place, decision["front"]), strict=True), color=AFTER, marker="o", markersize=3, label="front")
    uniform = [place(point) for point in decision["uniform"]]
    axes.scatter(*zip(*uniform, strict=True), s=30, color=BEFORE, zorder=3, label="one choice in all layers")
    for number, point in enumerate(uniform):
        axes.annotate(number, point, (5, 4), textcoords="offset points", fontsize=9, color=MUTED)
    taken = place({"cost": decision["cost"], "loss": decision["predicted_loss"]})
    axes.scatter(*taken, s=90, color=WORSE, marker="*", zorder=4, label="taken")
    axes.axvline(decision["budget"] / present, color=MUTED, linewidth=0.9, linestyle="--", label="budget")
    axes.set_yscale("log")
    axes.set_xlabel(f"{BUDGET_UNITS[decision['unit']]}, % of what these layers take now", color=INK)
    axes.set_ylabel("predicted loss, nats a token", color=INK)
    axes.set_title("What a budget costs in loss", fontsize=11, fontweight="bold", color=INK)
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_table(figure: Any, axes: Any, decision: dict[str, Any]) -> None:
    """Loss of every choice (down) in every layer (along); the ones taken are marked."""
    from matplotlib.colors import LogNorm

    rows, names = decision["table"], decision["choices"]
    losses = [[max(row["losses"][number], LEAST_LOSS) for row in rows] for number in range(len(names))]
    most = max(max(map(max, losses)), 2 * LEAST_LOSS)
    image = axes.imshow(losses, cmap="Blues", norm=LogNorm(LEAST_LOSS, most), aspect="auto", interpolation="nearest")
    chosen = [decision["targets"][row["layer"]] for row in rows]
    axes.scatter(range(len(rows)), chosen, s=26, color=WORSE, marker="*")
    axes.set_yticks(range(len(names)), [f"{name}   {number}" for number, name in enumerate(names)], fontsize=8)
    step = max(len(rows) // 10, 1)
    axes.set_xticks(range(0, len(rows), step), [row["layer"] for row in rows[::step]], fontsize=9)
    axes.set_xlabel("layer", color=INK)
    axes.set_title("What each choice loses in each layer", fontsize=11, fontweight="bold", color=INK)
    figure.colorbar(image, ax=axes, label=f"nats a token, from {LEAST_LOSS}", pad=0.02)
