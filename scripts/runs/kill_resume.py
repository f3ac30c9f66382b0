"""A composed recipe killed at random moments and given again: does it end with the same bytes?

    python scripts/runs/kill_resume.py [--model FOLDER] [--text bbc] [--kills 20] [--seed 0] [--output FILE.json]

Without a folder a random model of some hundred thousand parameters is made, with a tokenizer of the text. Every run is
a process of its own, forked from one that has imported everything, so that the kills hit the work. The moments are
uniform over the time that a run took undisturbed; one that ends before its moment comes says how long that is now.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hf_llmkernel import LLMKernelForCausalLM  # noqa: E402
from hf_llmkernel.compress import compress  # noqa: E402
from hf_llmkernel.data import load_documents, split_documents  # noqa: E402
from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions  # noqa: E402
from hf_llmkernel.presets import preset_config  # noqa: E402

MODEL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "vocab_size": 1024}
MEASURED = ("report.json", "README.md")  # hold times
STAGES = [
    {"drop_layers": {"count": 1, "metric": "block_influence"}},
    {"prune_heads": {"ratio": 0.5, "method": "flap"}},
    {"prune_ffn": {"ratio": 0.25, "method": "flap", "align": 16}},
    {"factorize": {"ratio": 0.2, "allocation": "global", "align": 8, "exclude": ["k_proj", "v_proj"]}},
    {"sparsify": {"sparsity": 0.5, "allocation": "owl"}},
    {"quantize": {"bits": 4, "group_size": 32}},
]


def make_model(folder: Path, text: str, seed: int) -> None:
    """A random model with a tokenizer of the text."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    documents, _ = split_documents(load_documents(text))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents, vocab_size=MODEL["vocab_size"], show_progress=False)
    torch.manual_seed(seed)
    LLMKernelForCausalLM(preset_config("tiny", initializer_range=0.1, **MODEL)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)


def start(model: Path, recipe: dict[str, Any], out: Path) -> Any:
    """A process that runs the recipe."""
    arguments = (model, recipe, out, None, False)
    process = multiprocessing.get_context("fork").Process(target=compress, args=arguments)
    process.start()
    return process


def finish(model: Path, recipe: dict[str, Any], out: Path) -> float:
    """Runs the recipe to its end; returns the seconds. Raises `RuntimeError` where it fails."""
    started = time.monotonic()
    process = start(model, recipe, out)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"output={out}: the run ended with {process.exitcode}; see its traceback above")
    return time.monotonic() - started


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that holds no times."""
    files = (path for path in sorted(folder.iterdir()) if path.name not in MEASURED)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def found(part: Path) -> str:
    """What a killed run has left, in words."""
    work = part / "work"
    if not work.is_dir():
        return "nothing but the folder"
    phases = len(list(work.glob("phase-*.json")))
    now = [*sorted(work.glob(f"sweep-{phases:02d}")), *sorted(work.glob("survey-*"))]
    layers = [f"{folder.name} with {len(list(folder.glob('layer-*.json')))} layers" for folder in now]
    return ", ".join([f"{phases} phases", *layers, *(["the result"] if list(part.glob("model*")) else [])])


def kill_and_resume(model: Path, recipe: dict[str, Any], out: Path, moment: float) -> dict[str, Any] | float:
    """One run that is killed at a moment and then ended; the seconds that it took where it ended before."""
    started = time.monotonic()
    process = start(model, recipe, out)
    process.join(moment)
    took = time.monotonic() - started
    process.kill()
    process.join()
    if process.exitcode == 0:
        return took
    left = found(out.with_name(f"{out.name}.part"))
    return {"seconds": round(moment, 3), "found": left, "resumed_seconds": round(finish(model, recipe, out), 3)}


def run_all(model: Path, text: str, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    recipe = {"calibration": {"source": text, "samples": 32, "length": 128}, "stages": STAGES}
    whole = finish(model, recipe, folder / "whole")
    expected = digests(folder / "whole")
    draw = random.Random(seed)
    runs: list[dict[str, Any]] = []
    latest = whole
    while len(runs) < kills:
        out = folder / f"out-{len(runs)}"
        run = kill_and_resume(model, recipe, out, draw.uniform(0, latest))
        if not isinstance(run, dict):
            latest = run
            shutil.rmtree(out)
            continue
        runs.append({**run, "same_bytes": digests(out) == expected})
        print(f"{len(runs)}/{kills}: {runs[-1]}", file=sys.stderr)
    shows = {"killed": len(runs), "same_bytes": sum(run["same_bytes"] for run in runs)}
    return {"recipe": recipe, "whole_seconds": round(whole, 3), "files": sorted(expected), "runs": runs, "shows": shows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="of this family, with a tokenizer")
    parser.add_argument("--text", default="bbc")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as workspace:
        model = given.model or Path(workspace) / "model"
        if given.model is None:
            make_model(model, given.text, given.seed)
        result = run_all(model, given.text, given.kills, given.seed, Path(workspace))
    settings = {"model": MODEL if given.model is None else given.model.name, "text": given.text, "seed": given.seed}
    described = {"machine": describe_machine(), "versions": describe_versions()}
    commit = {"commit": describe_commit(Path(__file__).parent)}
    given.output.write_text(json.dumps({**settings, **result, **described, **commit}, indent=2) + "\n")
    print(json.dumps(result["shows"], indent=2))


if __name__ == "__main__":
    main()
