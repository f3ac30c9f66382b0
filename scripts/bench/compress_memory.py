"""Peak memory of `llmkernel compress` on a large random Llama checkpoint.

    python scripts/bench/compress_memory.py --folder SCRATCH --gigabytes 4.4 [--limit 2.5] [--layers 21]

Writes a sharded fp32 checkpoint of the 1.1 B shape (2048 wide, 5632 in the feed-forward) into a new folder below
SCRATCH, runs a composed recipe on 32 x 512 calibration tokens in a process of its own, removes both, and prints one
JSON line. `--layers` ends the work, and with it the walk, after that many layers. Exits 1 where the peak is above the
limit, in GiB. Needs three times the size on disk.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from convert_memory import GIB, VOCABULARY, write_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions


def main() -> None:
    options = parse_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="compress_memory-", dir=options.folder) as scratch:
        source = Path(scratch) / "source"
        written = write_checkpoint(source, round(options.gigabytes * 1e9))
        write_tokenizer(source)
        recipe = write_recipe(Path(scratch), options.layers)
        command = [sys.executable, "-m", "hf_llmkernel", "compress", str(source), "--recipe", str(recipe)]
        started = time.monotonic()
        plan = run([*command, "--dry-run", "--json"])
        planned = time.monotonic()
        result = run([*command, "--output", str(Path(scratch) / "result"), "--json"])
        seconds = time.monotonic() - planned
    measured = {
        **written,
        "layers": options.layers,
        "estimated_bytes": plan["peak_memory_bytes"],
        "estimated_seconds": plan["seconds"],
        "dry_run_seconds": round(planned - started, 1),
        "peak_bytes": result["peak_memory_bytes"],
        "limit_bytes": round(options.limit * GIB),
        "seconds": round(seconds, 1),
        "seconds_by": result["seconds_by"],
        "weight_bytes": result["weight_bytes"],
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).parent),
    }
    print(json.dumps(measured))
    sys.exit(0 if measured["peak_bytes"] <= measured["limit_bytes"] else 1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=4.4)
    parser.add_argument("--limit", type=float, default=2.5)
    parser.add_argument("--layers", type=int, default=21)
    return parser.parse_args()


def write_tokenizer(folder: Path) -> None:
    """One token a word, so that random text has tokens of the whole vocabulary."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def write_recipe(folder: Path, layers: int) -> Path:
    """Random text, and a recipe that prunes, makes sparse and quantizes."""
    draw = random.Random(0)
    documents = [" ".join(f"w{draw.randrange(VOCABULARY)}" for _ in range(600)) for _ in range(64)]
    (folder / "text.txt").write_text("\n\n\n".join(documents))
    covered = {"layers": [0, layers]}
    stages = [
        {"prune_ffn": {"ratio": 0.125, **covered}},
        {"sparsify": {"sparsity": 0.5, **covered}},
        {"quantize": {"bits": 8, **covered}},
    ]
    calibration = {"source": str(folder / "text.txt"), "samples": 32, "length": 512}
    (folder / "recipe.json").write_text(json.dumps({"calibration": calibration, "stages": stages}))
    return folder / "recipe.json"


def run(command: list[str]) -> dict:
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
