"""Reading a prompt with the native kernels, against the dense model on torch and llama.cpp, in turns.

    python scripts/bench/prefill.py DENSE MODEL … --output scripts/bench/prefill.json [--gguf FILE …] [--tokens 512 …]

DENSE and every MODEL are folders, FILEs are read by the package xllamacpp. One sequence of random tokens, the cache
empty before, logits of the last token alone. Tokens a second are medians over rounds, with the slowest and the fastest;
ratios are medians over rounds of the two that followed each other, to the dense model in bfloat16 on torch.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions
from hf_llmkernel.kernels import disabled, isa

REFERENCE = "dense on torch"


def main() -> None:
    arguments = parse_arguments()
    readers = torch_readers(arguments.dense, arguments.models)
    readers |= {f"llama.cpp {file.parent.name}": llama_cpp(file, max(arguments.tokens)) for file in arguments.gguf}
    with torch.inference_mode():
        results = {tokens: measure(readers, arguments.rounds, tokens) for tokens in arguments.tokens}
    content = {
        "results": results,
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).parent),
    }
    arguments.output.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(results, indent=2), file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512])
    return parser.parse_args()


def torch_readers(dense: Path, folders: list[Path]) -> dict[str, Callable[[int], float]]:
    """Functions that read so many tokens and say how many a second: of the dense model without and with kernels, …"""

    def read(model: Any, tokens: int) -> float:
        prompt = torch.randint(model.vocab_size, (1, tokens))
        cache = DynamicCache(config=model.config)
        started = time.perf_counter()
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return tokens / (time.perf_counter() - started)

    def read_on_torch(tokens: int) -> float:
        with disabled():
            return read(models[0], tokens)

    paths = [dense, *folders]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval() for path in paths]
    native = {path.name: partial(read, model) for path, model in zip(paths, models, strict=True)}
    return {REFERENCE: read_on_torch, **native}


def llama_cpp(file: Path, longest: int) -> Callable[[int], float]:
    """The same of llama.cpp's server, by its own clock."""
    xllamacpp: Any = importlib.import_module("xllamacpp")  # it has no types

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel = longest + 32, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(parameters)

    def read(tokens: int) -> float:
        prompt = torch.randint(1000, 40000, (tokens,)).tolist()
        body = {"prompt": prompt, "n_predict": 1, "cache_prompt": False, "ignore_eos": True}
        return post(f"{server.listening_address}/completion", body)["timings"]["prompt_per_second"]

    return read


def post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(50):  # the endpoint comes a moment after the address
        try:
            return json.load(opener.open(request, timeout=120))
        except urllib.error.HTTPError as error:
            if error.code not in (404, 503):
                raise
            time.sleep(0.1)
    raise RuntimeError(f"{address}: no answer")


def measure(readers: dict[str, Callable[[int], float]], rounds: int, tokens: int) -> dict[str, Any]:
    """Tokens a second and the ratio to the reference, by reader."""
    for read in readers.values():
        read(tokens)  # lays out the weights
    speeds = {name: [] for name in readers}
    for _ in range(rounds):
        for name, read in readers.items():
            speeds[name].append(read(tokens))
    ratios = {
        name: [mine / reference for mine, reference in zip(values, speeds[REFERENCE], strict=True)]
        for name, values in speeds.items()
    }
    return {name: {"tokens_per_second": spread(speeds[name]), "ratio": spread(ratios[name])} for name in readers}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


if __name__ == "__main__":
    main()
