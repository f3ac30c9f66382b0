"""What each compression method costs and leaves, on one model, one protocol and one calibration set.

    python scripts/bench/compress.py MODEL --output scripts/bench/compress.json [--only NAME …] [--samples 64]

MODEL is a folder that `llmkernel convert` wrote. Every recipe runs in a process of its own, whose peak memory is the
one reported; perplexity is measured on articles withheld from calibration and on a second text, dense and compressed on
the same windows. Results that are in the output already are kept, unless `--only` names them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions

SEED = 0
SPARSE = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}, "70 %": {"sparsity": 0.7}}
METHODS = {
    "magnitude": {"method": "magnitude"},
    "Wanda": {"method": "wanda"},
    "SparseGPT": {"method": "sparsegpt"},
    "ADMM": {"method": "admm"},
    "Wanda + least squares": {"method": "wanda", "update": "least_squares"},
    "SparseGPT + least squares": {"method": "sparsegpt", "update": "least_squares"},
    "SparseGPT + ADMM": {"method": "sparsegpt", "update": "admm"},
}
RECIPES: dict[str, list[Any]] = {
    **{
        f"{amount}, {name}": [{"sparsify": {**pattern, **method}}]
        for amount, pattern in SPARSE.items()
        for name, method in METHODS.items()
    },
    "70 %, ADMM, OWL": [{"sparsify": {"sparsity": 0.7, "allocation": "owl"}}],
    "70 %, SparseGPT, OWL": [{"sparsify": {"sparsity": 0.7, "method": "sparsegpt", "allocation": "owl"}}],
    "FFN -25 %, Wanda": [{"prune_ffn": {"ratio": 0.25, "method": "wanda"}}],
    "FFN -25 %, OBS": [{"prune_ffn": {"ratio": 0.25, "method": "obs"}}],
    "FFN -25 %, FLAP, bias": [{"prune_ffn": {"ratio": 0.25, "method": "flap", "update": "bias"}}],
    "FFN -25 %, FLAP, no update": [{"prune_ffn": {"ratio": 0.25, "method": "flap", "update": "none"}}],
    "FFN -25 %, FLAP, global": [{"prune_ffn": {"ratio": 0.25, "method": "flap", "allocation": "global"}}],
    "FFN -25 %, Wanda, global": [{"prune_ffn": {"ratio": 0.25, "method": "wanda", "allocation": "global"}}],
    "FFN -25 %, FLAP, global, refit": [
        {"prune_ffn": {"ratio": 0.25, "method": "flap", "allocation": "global"}}, "refit"
    ],
    "FFN -25 %, Minitron": [{"prune_ffn": {"ratio": 0.25, "method": "minitron"}}],
    "FFN -25 %, magnitude": [{"prune_ffn": {"ratio": 0.25, "method": "magnitude"}}],
    "heads -33 %, FLAP": [{"prune_heads": {"ratio": 0.33, "method": "flap"}}],
    "heads -33 %, OBS": [{"prune_heads": {"ratio": 0.33, "method": "obs"}}],
    "hidden -11 %, PCA": [{"prune_hidden": {"ratio": 0.11}}],
    "hidden -11 %, Minitron": [{"prune_hidden": {"ratio": 0.11, "method": "minitron"}}],
    "3 layers, block influence": [{"drop_layers": {"count": 3, "metric": "block_influence"}}],
    "3 layers, perplexity": [{"drop_layers": {"count": 3, "metric": "perplexity"}}],
    "6 sublayers, perplexity": [{"drop_layers": {"count": 6, "unit": "sublayer"}}],
    "3 layers, block influence, refit": [{"drop_layers": {"count": 3, "metric": "block_influence"}}, "refit"],
    "3 layers, perplexity, refit": [{"drop_layers": {"count": 3, "metric": "perplexity"}}, "refit"],
    "50 %, ADMM, refit": ["refit", {"sparsify": {"sparsity": 0.5}}],
    "2:4, ADMM, refit": ["refit", {"sparsify": {"pattern": "2:4"}}],
    "rank -20 %, SVD": [{"factorize": {"ratio": 0.2, "method": "svd"}}],
    "rank -20 %, SVD-LLM": [{"factorize": {"ratio": 0.2}}],
    "rank -20 %, SVD-LLM, global": [{"factorize": {"ratio": 0.2, "allocation": "global"}}],
}


def main(recipes: dict[str, list[Any]], description: str | None) -> None:
    arguments = parse_arguments(recipes, description)
    results = kept_results(arguments)
    for name in arguments.only or [name for name in recipes if name not in results]:
        results[name] = run_recipe(arguments, recipes[name])
        print(f"{name}: {json.dumps(results[name]['perplexity_ratio'])}", file=sys.stderr)
        write(arguments, results)


def kept_results(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that are in the output already, which must be of this protocol."""
    if not arguments.output.is_file():
        return {}
    before = json.loads(arguments.output.read_text())
    for name, own in protocol(arguments).items():
        if before[name] != own:
            sys.exit(f"{arguments.output}: its {name} is {before[name]}, not {own}; name another output.")
    return before["results"]


def protocol(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "calibration": {"text": arguments.text, "samples": arguments.samples, "length": arguments.length},
        "evaluation": {"tokens": arguments.tokens, "context": 1024, "second_text": arguments.second_text},
        "seed": SEED,
    }


def parse_arguments(recipes: dict[str, list[Any]], description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=recipes, metavar="NAME")
    parser.add_argument("--text", default="bbc")
    parser.add_argument("--second-text", default="bible")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    return parser.parse_args()


def run_recipe(arguments: argparse.Namespace, stages: list[Any]) -> dict[str, Any]:
    """Compresses in a child process; returns what it says, its seconds and peak memory, and the second text's ratio."""
    calibration = {"source": arguments.text, "samples": arguments.samples, "length": arguments.length, "seed": SEED}
    with tempfile.TemporaryDirectory() as scratch:
        recipe, output = Path(scratch) / "recipe.json", Path(scratch) / "result"
        recipe.write_text(json.dumps({"calibration": calibration, "stages": stages}))
        command = [sys.executable, "-m", "hf_llmkernel", "compress", str(arguments.model)]
        started = time.monotonic()
        command += ["--recipe", str(recipe), "--output", str(output), "--json"]
        printed = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        seconds = time.monotonic() - started
        measured = {text: compare(arguments, output, text) for text in (arguments.text, arguments.second_text)}
        shutil.rmtree(output)
    return {
        "stages": stages,
        "seconds": round(seconds, 1),
        "seconds_by": printed["seconds_by"],
        "peak_memory_bytes": printed["peak_memory_bytes"],
        "weight_bytes": printed["weight_bytes"],
        **{
            name: {text: values[name] for text, values in measured.items()}
            for name in ("perplexity", "baseline_perplexity", "perplexity_ratio", "perplexity_ratio_standard_error")
        },
    }


def compare(arguments: argparse.Namespace, output: Path, text: str) -> dict[str, Any]:
    """The report of the result against the dense model on one text."""
    from hf_llmkernel.evaluate import evaluate

    report = evaluate(
        output, text=text, tokens=arguments.tokens, baseline=dense_report(arguments, text), speed=False, progress=False
    )
    return report.to_dict()


DENSE: dict[str, Any] = {}


def dense_report(arguments: argparse.Namespace, text: str) -> Any:
    """The dense model's own report, measured once a text."""
    from hf_llmkernel.evaluate import evaluate

    if text not in DENSE:
        DENSE[text] = evaluate(arguments.model, text=text, tokens=arguments.tokens, speed=False, progress=False)
    return DENSE[text]


def write(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    content = {
        "model": arguments.model.name,
        **protocol(arguments),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).parent),
        "results": results,
    }
    arguments.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(RECIPES, __doc__)
