"""What each way to quantize costs and leaves, alone and on pruned, sparse and low-rank models.

    python scripts/bench/quantize.py MODEL --output scripts/bench/quantize.json [--only NAME …] [--samples 64]

Protocol, options and results as `compress.py`, which runs the recipes. Beside the output, `quantize.png` shows bytes of
the whole model against the ratio of perplexities, with the front that no other recipe beats in both.
"""

import json
import sys
from pathlib import Path
from typing import Any

from compress import main
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_llmkernel.evaluate.plot import AFTER, INK, MUTED, pareto_front

INT4 = {"bits": 4, "group_size": 64}
ZEROS = {**INT4, "symmetric": False}
FLOATING_ZEROS = {**ZEROS, "zero_point_dtype": "float16"}
BEST = {"method": "coordinate_descent"}
FOURTH = {"quantize": {**FLOATING_ZEROS, "method": "gptq"}}
# No linear is left for these: the embedding alone.
EMBEDDING_INT8 = {"quantize": {"bits": 8, "group_size": 64, "embeddings": True, "exclude": ["*"]}}
EMBEDDING_INT4 = {
    "quantize": {**FLOATING_ZEROS, "group_size": 32, "method": "hqq", "embeddings": True, "exclude": ["*"]}
}
RECIPES: dict[str, list[Any]] = {
    "int8 g64, rtn": [{"quantize": {"bits": 8, "group_size": 64}}],
    "bitsandbytes nf4": [{"bitsandbytes": {"quant_type": "nf4"}}],
    "bitsandbytes nf4, double quantization": [{"bitsandbytes": {"quant_type": "nf4", "double_quant": True}}],
    "int4 g64, rtn": [{"quantize": INT4}],
    "int4 g64, rtn, searched scales": [{"quantize": {**INT4, "scale_search": True}}],
    "int4 g64, GPTQ as in the paper": [
        {"quantize": {**INT4, "method": "gptq", "act_order": False, "scale_search": False}}
    ],
    "int4 g64, GPTQ": [{"quantize": {**INT4, "method": "gptq"}}],
    "int4 g64, coordinate descent": [{"quantize": {**INT4, **BEST}}],
    "int4 g64 + zeros, rtn": [{"quantize": ZEROS}],
    "int4 g64 + zeros, GPTQ": [{"quantize": {**ZEROS, "method": "gptq"}}],
    "int4 g64 + zeros, coordinate descent": [{"quantize": {**ZEROS, **BEST}}],
    "int4 g64 + fp16 zeros, HQQ": [{"quantize": {**FLOATING_ZEROS, "method": "hqq"}}],
    "int4 g64 + fp16 zeros, GPTQ": [{"quantize": {**FLOATING_ZEROS, "method": "gptq"}}],
    "int4 g64 + fp16 zeros, coordinate descent": [{"quantize": {**FLOATING_ZEROS, **BEST}}],
    "int4 g64 + fp16 zeros, AWQ, GPTQ": [{"quantize": {**FLOATING_ZEROS, "method": "gptq", "fold": "awq"}}],
    "int4 g64 + fp16 zeros, AWQ, coordinate descent": [{"quantize": {**FLOATING_ZEROS, **BEST, "fold": "awq"}}],
    "int4 g64 + fp16 zeros, coordinate descent, refit": ["refit", {"quantize": {**FLOATING_ZEROS, **BEST}}],
    # Whole models near a quarter of the bf16 bytes: the embedding is a fifth of the parameters.
    "int4 g64 + fp16 zeros, GPTQ, embedding int8": [FOURTH, EMBEDDING_INT8],
    "int4 g64 + fp16 zeros, GPTQ, embedding int4": [FOURTH, EMBEDDING_INT4],
    "refit, int4 g64 + fp16 zeros, GPTQ, embedding int4": ["refit", FOURTH, EMBEDDING_INT4],
    "FFN -12.5 %, refit, int4 GPTQ, embedding int4": [
        {"prune_ffn": {"ratio": 0.125}}, "refit", FOURTH, EMBEDDING_INT4
    ],
    "FFN -25 % global, refit, int4 GPTQ, embedding int4": [
        {"prune_ffn": {"ratio": 0.25, "method": "flap", "allocation": "global"}}, "refit", FOURTH, EMBEDDING_INT4
    ],
    "2:4": [{"sparsify": {"pattern": "2:4"}}],
    "2:4 + int4 g64": [{"sparsify": {"pattern": "2:4"}}, {"quantize": {**INT4, **BEST}}],
    # 3.25 bits a weight otherwise: the bytes of 2:4 + int4 from fewer weights of four bits.
    "refit, 2:4 + int4 g64": ["refit", {"sparsify": {"pattern": "2:4"}}, {"quantize": {**INT4, **BEST}}],
    "FFN -31 % global, refit, int4 g64": [
        {"prune_ffn": {"ratio": 0.31, "method": "flap", "allocation": "global"}},
        "refit",
        {"quantize": {**INT4, **BEST}},
    ],
    "7 layers dropped, refit, int4 g64": [{"drop_layers": {"count": 7}}, "refit", {"quantize": {**INT4, **BEST}}],
    "50 % + int8 g64": [{"sparsify": {"sparsity": 0.5}}, {"quantize": {"bits": 8, "group_size": 64}}],
    "FFN -25 % + int4 g64": [{"prune_ffn": {"ratio": 0.25}}, {"quantize": {**FLOATING_ZEROS, **BEST}}],
    "rank -20 % + int4 g64": [{"factorize": {"ratio": 0.2}}, {"quantize": {**FLOATING_ZEROS, **BEST}}],
}

WORST = 3.0  # a ratio above it is left out of the picture


def plot(results: dict[str, Any], path: Path) -> None:
    """Bytes against the ratio on the first text, the front as a line."""
    points = {
        name: (entry["weight_bytes"] / 1e6, next(iter(entry["perplexity_ratio"].values())))
        for name, entry in results.items()
    }
    points = {name: point for name, point in points.items() if point[1] <= WORST}
    front = pareto_front(list(points.values()))
    figure = Figure(figsize=(13, 8), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*front, strict=True), color=AFTER, linewidth=1.2)
    # Names stand beside the picture, from the largest ratio down as the points do: many lie too close for names.
    places = sorted(points.items(), key=lambda entry: entry[1][1], reverse=True)
    for number, (name, point) in enumerate(places, 1):
        color = AFTER if point in front else MUTED
        axes.plot(*point, marker="o", markersize=5, color=color)
        offset = (-13, -3) if number % 2 else (6, -3)
        axes.annotate(str(number), point, xytext=offset, textcoords="offset points", fontsize=8, color=color)
        axes.annotate(
            f"{number}  {name}", (1.02, 1 - (number - 0.5) / len(places)), xycoords="axes fraction", fontsize=8,
            va="center", color=color, annotation_clip=False,
        )  # fmt: skip
    axes.margins(x=0.06)
    axes.set_yscale("log")
    axes.set_yticks(ticks := [1, 1.05, 1.1, 1.2, 1.4, 1.7, 2, 2.5, 3], [f"×{tick}" for tick in ticks], minor=False)
    axes.set_xlabel("MB of weights, the whole model", color=INK)
    axes.set_ylabel("perplexity against the dense model's", color=INK)
    axes.grid(color="#eeeeee")
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main(RECIPES, __doc__)
    output = Path(sys.argv[sys.argv.index("--output") + 1])
    plot(json.loads(output.read_text())["results"], output.with_suffix(".png"))
