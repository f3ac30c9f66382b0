"""Decoding with the native kernels against the same model on torch, in turns.

    python scripts/bench/decode.py MODEL … --output scripts/bench/decode.json [--rounds 7] [--tokens 64]

Each MODEL is a folder. Greedy `generate` after a short prompt, its time included, batch 1; tokens a second are medians,
with the slowest and the fastest round; the ratio is the median over rounds of the two that followed each other.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions
from hf_llmkernel.kernels import disabled, isa

PROMPT = "The history of the city began when the river was crossed by"


def main() -> None:
    arguments = parse_arguments()
    results = {folder.name: measure(folder, arguments.rounds, arguments.tokens) for folder in arguments.models}
    content = {
        "results": results,
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "prompt": PROMPT,
        "new_tokens": arguments.tokens,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).parent),
    }
    arguments.output.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(results, indent=2), file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    return parser.parse_args()


def measure(folder: Path, rounds: int, tokens: int) -> dict[str, Any]:
    """Tokens a second with and without the kernels, and whether both wrote the same."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    native_text, _ = decode(model, prompt, tokens)  # lays out the weights
    with disabled():
        torch_text, _ = decode(model, prompt, tokens)
    native, plain = [], []
    for _ in range(rounds):
        native.append(decode(model, prompt, tokens)[1])
        with disabled():
            plain.append(decode(model, prompt, tokens)[1])
    ratios = [a / b for a, b in zip(native, plain, strict=True)]
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "native": spread(native),
        "torch": spread(plain),
        "ratio": spread(ratios),
        "same_tokens": bool(torch.equal(native_text, torch_text)),
    }


def decode(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float]:
    """The tokens after the prompt, and how many a second."""
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    started = time.perf_counter()
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return written, tokens / (time.perf_counter() - started)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


if __name__ == "__main__":
    main()
