"""Whether a searched mix of sparsities beats the same one in every layer, at equal bytes, on text held out.

    python scripts/bench/search.py MODEL --output scripts/bench/search.json [--tokens 16384]

MODEL is a folder that `llmkernel convert` wrote. Each budget is what a uniform sparsity takes in bytes. What the
choices lose does not depend on the budget: the search for the first one measures it, and the mixes for the others are
found from its table and made by a recipe that names each layer's sparsity. All models are measured on the same windows
of documents withheld from calibration, and of a second text; standard errors are those of the mean difference window by
window. What is in the output already is kept, and a model that was interrupted goes on, in a folder beside the output.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from hf_llmkernel.checkpoint.model_folder import ModelFolder
from hf_llmkernel.compress import compress
from hf_llmkernel.compress.plan import layer_sizes, own_layers
from hf_llmkernel.compress.search.knapsack import knapsack_front
from hf_llmkernel.compress.sparsify.stage import Sparsify
from hf_llmkernel.evaluate import evaluate
from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions

SEED = 0
SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
BUDGETS = (0.5, 0.4, 0.6)  # the first one's search measures the table
CONFIDENCE = 1.96  # standard errors


def main() -> None:
    arguments = parse_arguments()
    models = json.loads(arguments.output.read_text())["models"] if arguments.output.is_file() else {}
    names = [f"{kind} {budget}" for budget in BUDGETS for kind in ("searched", "uniform")]
    for name in (*names, "dense"):
        if name not in models:
            models[name] = measure(arguments, name, models)
            write(arguments, models)
            print(f"{name}: {json.dumps(perplexities(models[name]))}", file=sys.stderr)
    print(json.dumps(comparisons(models), indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--text", default="bbc")
    parser.add_argument("--second-text", default="bible")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--search-tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=16384)
    return parser.parse_args()


def measure(arguments: argparse.Namespace, name: str, models: dict[str, Any]) -> dict[str, Any]:
    """Makes a model, unless it is the dense one, and measures it on both texts."""
    if name == "dense":
        return {"nlls": window_nlls(arguments, arguments.model)}
    kind, budget = name.split()
    calibration = {"source": arguments.text, "samples": arguments.samples, "length": arguments.length, "seed": SEED}
    stages = stages_of(arguments, kind, float(budget), models)
    output = arguments.output.with_name(f"{arguments.output.stem}-{kind}-{budget}")
    made = output / "made.json"
    if not made.is_file():
        shutil.rmtree(output, ignore_errors=True)
        result = compress(arguments.model, {"calibration": calibration, "stages": stages}, output)
        made.write_text(json.dumps({**result.to_dict(), "decision": result.stages[0].get("decision")}))
    facts = json.loads(made.read_text())
    found = {name: facts[name] for name in ("seconds", "seconds_by", "peak_memory_bytes", "weight_bytes", "decision")}
    found["nlls"] = window_nlls(arguments, output)
    if found["decision"] is not None:
        shutil.copy(output / "front.png", arguments.output.with_suffix(".png"))
    shutil.rmtree(output)
    return found


def stages_of(
    arguments: argparse.Namespace, kind: str, sparsity: float, models: dict[str, Any]
) -> list[dict[str, Any]]:
    """The recipe's stages: one sparsity, the search, or the mix from the table that a search has measured."""
    if kind == "uniform":
        return [{"sparsify": {"sparsity": sparsity}}]
    budget = uniform_bytes(arguments.model, sparsity)
    if sparsity == BUDGETS[0]:
        choices = [[{"sparsify": {"sparsity": choice}}] for choice in SPARSITIES]
        return [{"search": {"bytes": budget, "choices": choices, "tokens": arguments.search_tokens}}]
    table = models[f"searched {BUDGETS[0]}"]["decision"]["table"]
    front = knapsack_front([row["losses"] for row in table], [row["costs"] for row in table])
    mix = front.choices[front.within(budget)].tolist()
    return [
        {"sparsify": {"sparsity": SPARSITIES[choice], "layers": [layer, layer + 1]}} for layer, choice in enumerate(mix)
    ]


def uniform_bytes(model: Path, sparsity: float) -> int:
    """Bytes of all layers at one sparsity."""
    folder = ModelFolder(model)
    layers = own_layers(folder.config)
    for layer in layers:
        Sparsify(sparsity=sparsity).plan(layer)
    return sum(layer_sizes(layer, folder.dtype)[1] for layer in layers)


def window_nlls(arguments: argparse.Namespace, model: Path) -> dict[str, list[float]]:
    """Mean nats a token of every window of both texts."""
    size = {"context": arguments.context, "tokens": arguments.tokens}
    reports = {text: evaluate(model, text, speed=False, **size) for text in (arguments.text, arguments.second_text)}
    return {text: list(report.window_nlls) for text, report in reports.items()}


def perplexities(model: dict[str, Any]) -> dict[str, float]:
    return {text: round(math.exp(statistics.fmean(nlls)), 3) for text, nlls in model["nlls"].items()}


def comparisons(models: dict[str, Any]) -> list[dict[str, Any]]:
    """Searched against uniform at each budget and on each text: perplexities, and their ratio with its interval."""
    found = []
    for budget in BUDGETS:
        if not {f"searched {budget}", f"uniform {budget}"} <= models.keys():
            continue
        searched, uniform = (models[f"{kind} {budget}"] for kind in ("searched", "uniform"))
        for text in searched["nlls"]:
            differences = [a - b for a, b in zip(searched["nlls"][text], uniform["nlls"][text], strict=True)]
            mean, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
            found.append(
                {
                    "uniform_sparsity": budget,
                    "text": text,
                    "weight_bytes": {"searched": searched["weight_bytes"], "uniform": uniform["weight_bytes"]},
                    "difference_nats": mean,
                    "difference_standard_error": error,
                    "ratio": math.exp(mean),
                    "ratio_interval": [math.exp(mean - CONFIDENCE * error), math.exp(mean + CONFIDENCE * error)],
                    "windows_better": sum(difference < 0 for difference in differences),
                    "windows": len(differences),
                }
            )
    return found


def write(arguments: argparse.Namespace, models: dict[str, Any]) -> None:
    texts = {"calibration": arguments.text, "evaluation": [arguments.text, arguments.second_text]}
    sizes = {name: getattr(arguments, name) for name in ("samples", "length", "search_tokens", "context", "tokens")}
    content = {
        "model": arguments.model.name,
        "texts": texts,
        "sizes": sizes,
        "seed": SEED,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).parent),
        "perplexity": {name: perplexities(model) for name, model in models.items()},
        "comparisons": comparisons(models),
        "models": models,
    }
    arguments.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
