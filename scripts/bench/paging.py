"""Tokens a second of a checkpoint larger than the memory it may take, against what the disk could give.

    python scripts/bench/paging.py --folder SCRATCH [--gigabytes 4.4] [--memory 1.5] [--tokens 8]

Writes a random fp32 Llama checkpoint of the 1.1 B shape below SCRATCH and converts it. A process of its own, which has
imported nothing else, generates from it within `--memory` GiB; before and after every token a stretch of the same file
is read past the page cache, for the bandwidth of the disk. Removes both and prints one JSON line: the peak of the
process's memory, and the share of the disk's bandwidth at which weights came. Exits 1 above the memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GIB = 1 << 30
STRETCH_BYTES = 512 << 20


def main() -> None:
    options = parse_options()
    if options.model is not None:
        generate(options)
        return
    from convert_memory import write_checkpoint

    from hf_llmkernel.convert import convert_checkpoint
    from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions

    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="paging-", dir=options.folder) as scratch:
        source, model = Path(scratch) / "source", Path(scratch) / "model"
        written = write_checkpoint(source, round(options.gigabytes * 1e9))
        convert_checkpoint(source, model)
        command = [sys.executable, __file__, "--folder", scratch, "--model", str(model)]
        command += ["--memory", str(options.memory), "--tokens", str(options.tokens)]
        measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    described = {"machine": describe_machine(), "versions": describe_versions()}
    print(json.dumps({**written, **measured, **described, "commit": describe_commit(Path(__file__).parent)}))
    sys.exit(0 if measured["peak_bytes"] <= measured["memory_bytes"] else 1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=4.4)
    parser.add_argument("--memory", type=float, default=1.5)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # of the process that measures
    return parser.parse_args()


def generate(options: argparse.Namespace) -> None:
    """Greedy tokens one by one, a stretch of the disk between them."""
    import torch

    from hf_llmkernel.evaluate.clean_process import peak_bytes
    from hf_llmkernel.generate.paging import load_paged

    memory = round(options.memory * GIB)
    started = time.perf_counter()
    model = load_paged(options.model, memory)
    loaded = time.perf_counter() - started
    pages: Any = model.pages
    ids = torch.arange(1, 9)[None]
    rates, steps, cache = [], [], None
    with torch.no_grad():
        for _ in range(options.tokens):
            if pages.pinned < len(pages.blocks) and pages._ahead:
                pages._ahead[1].result()  # the disk is nobody else's
            rates.append(disk_rate(pages.blocks[-1].extents[0].path))
            begun = time.perf_counter()
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            steps.append(time.perf_counter() - begun)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    streamed = sum(block.nbytes for block in pages.blocks[pages.pinned :])
    disk = max(rates)  # other work may hold a read back, nothing makes the disk faster
    print(
        json.dumps(
            {
                "memory_bytes": memory,
                "peak_bytes": peak_bytes(),
                "blocks": len(pages.blocks),
                "blocks_in_memory": pages.pinned,
                "load_seconds": round(loaded, 2),
                "streamed_bytes_a_token": streamed,
                "seconds_a_token": [round(step, 3) for step in steps],
                "disk_bytes_a_second": [round(rate) for rate in rates],
                "share_of_the_disk": [round(streamed / step / disk, 3) for step in steps],
            }
        )
    )


def disk_rate(path: Path) -> float:
    """Bytes a second of a long read past the page cache, through a buffer that is there already."""
    from hf_llmkernel.generate.paging import CHUNK_BYTES, Extent, aligned_buffer, read_extent

    buffer = aligned_buffer(CHUNK_BYTES)
    read = min(STRETCH_BYTES, path.stat().st_size) // CHUNK_BYTES * CHUNK_BYTES
    started = time.perf_counter()
    for offset in range(0, read, CHUNK_BYTES):
        read_extent(Extent(path, offset, CHUNK_BYTES, CHUNK_BYTES, {}), buffer)
    return read / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
