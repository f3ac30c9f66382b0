"""What rounding keys and values costs: perplexity of the second half of each window, read through the cache.

    python scripts/bench/kv_cache.py MODEL --output scripts/bench/kv_cache.json [--windows 8]

MODEL is a folder of a causal model. The first half of a window fills the cache, the rest follows in short steps, each
of which sees what is cached as it is stored. All caches see the same windows of documents withheld from calibration.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_llmkernel import IntegerCache
from hf_llmkernel.data import load_documents, split_documents, token_windows
from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions

CONTEXT, STEP = 1024, 16
CACHES: dict[str, Any] = {
    "full": lambda config: DynamicCache(config=config),
    "int8, one scale a head": lambda config: IntegerCache(config, 8),
    "int8, groups of 32": lambda config: IntegerCache(config, 8, 32),
    "int4, one scale a head": lambda config: IntegerCache(config, 4, config.head_dim),
    "int4, groups of 32": lambda config: IntegerCache(config, 4, 32),
    "int4, groups of 16": lambda config: IntegerCache(config, 4, 16),
}


def main() -> None:
    arguments = parse_arguments()
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    _, held_out = split_documents(load_documents("bbc"))
    windows = token_windows(tokenizer, held_out, CONTEXT, arguments.windows * CONTEXT)
    losses = {name: [loss(model, window, make(model.config)) for window in windows] for name, make in CACHES.items()}
    results = {name: compare(found, losses["full"]) for name, found in losses.items()}
    content = {
        "model": arguments.model.name,
        "windows": len(windows),
        "context": CONTEXT,
        "step": STEP,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).parent),
        "bytes_per_token": {name: bytes_per_token(model, make(model.config)) for name, make in CACHES.items()},
        "results": results,
    }
    arguments.output.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(results, indent=2), file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    return parser.parse_args()


@torch.inference_mode()
def loss(model: Any, window: torch.Tensor, cache: Any) -> float:
    """Mean negative log-likelihood of the second half of a window `[1024]`."""
    half, ids = CONTEXT // 2, window[None]
    logits = [model(ids[:, :half], past_key_values=cache).logits[:, -1:]]
    for start in range(half, CONTEXT, STEP):
        logits.append(model(ids[:, start : start + STEP], past_key_values=cache).logits)
    return F.cross_entropy(torch.cat(logits, dim=1)[0, :-1], ids[0, half:]).item()


def compare(losses: list[float], full: list[float]) -> dict[str, float]:
    """Perplexity, its ratio to the full cache's, and the ratio's standard error over windows."""
    differences = [a - b for a, b in zip(losses, full, strict=True)]
    ratio = math.exp(statistics.mean(differences))
    error = ratio * statistics.stdev(differences) / math.sqrt(len(differences))
    return {"perplexity": math.exp(statistics.mean(losses)), "ratio": ratio, "ratio_standard_error": error}


@torch.inference_mode()
def bytes_per_token(model: Any, cache: Any) -> float:
    """What a token takes in the cache, over all layers."""
    model(torch.zeros(1, 64, dtype=torch.long), past_key_values=cache)
    stored = (
        cache.nbytes()
        if isinstance(cache, IntegerCache)
        else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    )
    return stored / 64


if __name__ == "__main__":
    main()
