"""Greedy decoding with a draft against the model alone, in turns.

    python scripts/bench/speculative.py MODEL DRAFT … --output scripts/bench/speculative.json [--rounds 5]

MODEL and DRAFT are folders. Every prompt is continued by the model alone, then with each draft; the ratio of a draft is
the median over prompts and rounds of the two times, its lowest and highest those of a prompt's median. What is expected
of a draft, by `measure_draft`, stands beside what it gave. Before and after each pair of times a loop is timed that is
always the same; where it took 1.25 times its best, the pair is left out as throttled.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions
from hf_llmkernel.generate.drafts import load_draft, measure_draft
from hf_llmkernel.kernels import isa

PROMPTS = (
    "The history of the city began when the river was crossed by",
    "Question: What is photosynthesis?\nAnswer:",
    "Once upon a time, in a small village,",
    "def fibonacci(n):\n",
)
THROTTLED = 1.25


def main() -> None:
    arguments = parse_arguments()
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    results = {}
    for folder in arguments.drafts:
        results[folder.name] = measure(model, tokenizer, folder, prompts, arguments.rounds, arguments.tokens)
        print(json.dumps({folder.name: results[folder.name]}, indent=2), file=sys.stderr)
    content = {
        "model": arguments.model.name,
        "dtype": "bfloat16",
        "results": results,
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "prompts": PROMPTS,
        "new_tokens": arguments.tokens,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).parent),
    }
    arguments.output.write_text(json.dumps(content, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("drafts", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    return parser.parse_args()


def measure(
    model: Any, tokenizer: Any, folder: Path, prompts: list[torch.Tensor], rounds: int, tokens: int
) -> dict[str, Any]:
    draft = load_draft(model, tokenizer, str(folder))
    texts = [decode(model, prompt, tokens)[0] for prompt in prompts]
    drafted = [decode(model, prompt, tokens, draft)[0] for prompt in prompts]
    expected = [measure_draft(model, draft, text, ids.shape[1]) for text, ids in zip(texts, prompts, strict=True)]
    taken = []
    for _ in range(rounds):
        for index, prompt in enumerate(prompts):
            loops = [calibrate()]
            seconds = [decode(model, prompt, tokens, writer)[1] for writer in (None, draft)]
            loops.append(calibrate())
            taken.append((index, max(loops), *seconds))
    best = min(calibration for _, calibration, _, _ in taken)
    kept = [run for run in taken if run[1] < THROTTLED * best]
    of_prompts = [[run[2] / run[3] for run in kept if run[0] == index] for index in range(len(prompts))]
    medians = [statistics.median(ratios) for ratios in of_prompts if ratios]
    return {
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "same_tokens": all(map(torch.equal, drafted, texts)),
        "alone_tokens_per_second": statistics.median(tokens / run[2] for run in kept),
        "drafted_tokens_per_second": statistics.median(tokens / run[3] for run in kept),
        "ratio": {
            "median": statistics.median(ratio for ratios in of_prompts for ratio in ratios),
            "lowest": min(medians),
            "highest": max(medians),
        },
        "expected": {name: statistics.median(asdict(each)[name] for each in expected) for name in asdict(expected[0])},
        "runs": len(kept),
        "throttled_runs": len(taken) - len(kept),
    }


def decode(model: Any, prompt: torch.Tensor, tokens: int, draft: Any = None) -> tuple[torch.Tensor, float]:
    """The tokens of a prompt and after it, and the seconds they took."""
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": model.config.vocab_size}  # no end but this
    started = time.perf_counter()
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), assistant_model=draft, **options)
    return written, time.perf_counter() - started


def calibrate() -> float:
    """Seconds of a loop that is always the same."""
    started = time.perf_counter()
    sum(range(400_000))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
