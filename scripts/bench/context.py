"""What a token costs as the context grows: seconds a step after 128 … 8192 tokens, and the slope against the KV cache.

    python scripts/bench/context.py MODEL … --output scripts/bench/context.json [--lengths 128 1024 4096 8192]
                                                                       [--caches full int8]

Each MODEL is a folder. Its cache, of every kind asked for, is filled once for every length; a sample is 32 greedy steps
of batch 1 that end at
that length, their tokens removed again. In a round all models and lengths take turns, with a calibration before and
after each sample; one beside a slow calibration counts only where a length has fewer than two others. The slope is that
of a straight line through the medians, in seconds for each position; the bytes that the cache holds for a position
over it are the bandwidth at which the cache is read, and `share` is its part of the fastest reading seen here.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hf_llmkernel import IntegerCache
from hf_llmkernel.evaluate.ceilings import Calibration, Pace, best_pace
from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions
from hf_llmkernel.evaluate.speed import STEADY
from hf_llmkernel.kernels import isa

STEPS = 32
CACHES: dict[str, Callable[[Any], Any]] = {
    "full": lambda config: DynamicCache(config=config),
    "int8": lambda config: IntegerCache(config, 8),
    "int4": lambda config: IntegerCache(config, 4),
}


def main() -> None:
    arguments = parse_arguments()
    # Before inference mode: weights made in it are computed with by torch alone.
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval() for folder in arguments.models]
    with torch.inference_mode():
        contexts = {
            f"{folder.name}, {kind} cache": {length: Context(model, kind, length) for length in arguments.lengths}
            for folder, model in zip(arguments.models, models, strict=True)
            for kind in arguments.caches
        }
        paces = measure([each for own in contexts.values() for each in own.values()], arguments.rounds)
    best = best_pace(paces)
    results = {name: figures(own, best) for name, own in contexts.items()}
    content = {
        "results": results,
        "read_bytes_per_second": best.read,
        "steps": STEPS,
        "rounds": arguments.rounds,
        "isa": isa(),
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
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 4096, 8192])
    parser.add_argument("--caches", nargs="+", choices=list(CACHES), default=["full", "int8"])
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


class Context:
    """A model with a cache of `length - STEPS` random tokens; `samples` are seconds a step with the pace beside."""

    def __init__(self, model: Any, kind: str, length: int):
        if not STEPS < length <= model.config.max_position_embeddings:
            most = model.config.max_position_embeddings
            raise ValueError(f"lengths: {length}: must be above {STEPS} and at most the model's {most}.")
        self.model = model
        self.filled = length - STEPS
        self.cache = CACHES[kind](model.config)
        prompt = torch.randint(model.vocab_size, (1, self.filled))
        self.first = self.step(prompt)
        self.samples: list[tuple[float, Pace]] = []

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def seconds(self) -> float:
        """Of a step, the mean of `STEPS`."""
        token = self.first
        start = time.perf_counter()
        for _ in range(STEPS):
            token = self.step(token)
        taken = (time.perf_counter() - start) / STEPS
        self.cache.crop(-STEPS)
        return taken

    def position_bytes(self) -> float:
        """Bytes that the cache holds for each position."""
        if isinstance(self.cache, IntegerCache):
            return self.cache.nbytes() / self.cache.get_seq_length()
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        return held / self.cache.get_seq_length()


def measure(contexts: list[Context], rounds: int) -> list[Pace]:
    """Adds a sample a round to every context; all paces of the machine."""
    calibration = Calibration()
    for context in contexts:
        context.seconds()
    paces = [calibration.pace()]
    for _ in range(rounds):
        for context in contexts:
            seconds = context.seconds()
            paces.append(calibration.pace())
            before, after = paces[-2:]
            slower = Pace(min(before.read, after.read), min(before.product, after.product))
            context.samples.append((seconds, slower))
    return paces


def figures(contexts: dict[int, Context], best: Pace) -> dict[str, Any]:
    lengths = list(contexts)
    costs = {length: cost(context, best) for length, context in contexts.items()}
    medians = [costs[length]["median"] for length in lengths]
    slope, start = numpy.polyfit(lengths, medians, 1)
    position_bytes = contexts[lengths[-1]].position_bytes()
    line = [start + slope * length for length in lengths]
    return {
        "seconds_per_token": costs,
        "slope_seconds_per_position": slope,
        "seconds_without_context": start,
        "largest_deviation_from_line": max(abs(a - b) / b for a, b in zip(medians, line, strict=True)),
        "cache_bytes_per_position": position_bytes,
        "cache_bytes_per_second": position_bytes / slope,
        "share": position_bytes / slope / best.read,
    }


def cost(context: Context, best: Pace) -> dict[str, float]:
    every = [seconds for seconds, _ in context.samples]
    steady = [seconds for seconds, pace in context.samples if pace.share_of(best) >= STEADY]
    used = steady if len(steady) > 1 else every
    return {
        "median": statistics.median(used),
        "lowest": min(used),
        "highest": max(used),
        "held_back": len(every) - len(steady),
    }


if __name__ == "__main__":
    main()
