"""Peak memory of `llmkernel convert` on a large random Llama checkpoint, against the largest block.

    python scripts/bench/convert_memory.py --folder SCRATCH --gigabytes 4.4

Writes a sharded fp32 checkpoint into a new folder below SCRATCH, converts it in a process of its own, removes both, and
prints one JSON line. Exits 1 where the peak is above the largest block plus 1 GiB. Needs twice the size on disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

GIB = 1 << 30
WIDTH = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
VOCABULARY = 32000

# VmHWM is the peak of this program alone; ru_maxrss would begin with that of the process it was forked from.
CONVERSION = """
import json, sys
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
from hf_llmkernel.convert import convert_checkpoint
before = peak()
report = convert_checkpoint(sys.argv[1], sys.argv[2], dtype=sys.argv[3] or None)
measured = {"imports_bytes": before, "peak_bytes": peak(), "seconds": report.seconds, "written_bytes": report.bytes}
print(json.dumps(measured))
"""


def main() -> None:
    options = parse_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="convert_memory-", dir=options.folder) as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        written = write_checkpoint(source, round(options.gigabytes * 1e9))
        started = time.monotonic()
        child = subprocess.run(
            [sys.executable, "-c", CONVERSION, str(source), str(target), options.dtype],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    measured = {**written, **json.loads(child.stdout.splitlines()[-1])}
    measured["child_seconds"] = round(time.monotonic() - started, 1)
    measured["limit_bytes"] = measured["largest_block_bytes"] + GIB
    measured["within_limit"] = measured["peak_bytes"] <= measured["limit_bytes"]
    print(json.dumps(measured))
    sys.exit(0 if measured["within_limit"] else 1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; what is written there is removed")
    parser.add_argument("--gigabytes", type=float, default=4.4, help="about how large the checkpoint is, in fp32")
    parser.add_argument("--dtype", default="", help="cast to float32, bfloat16 or float16; default: as it is")
    return parser.parse_args()


def write_checkpoint(folder: Path, size: int) -> dict[str, int]:
    """A random fp32 checkpoint of about `size` bytes, one shard a block; sizes of the whole and the largest block."""
    folder.mkdir()
    blocks = [block_shapes()]
    table = (VOCABULARY, WIDTH["hidden_size"])
    ends = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": table[1:]}
    layers = max(1, (size - bytes_of(ends)) // bytes_of(blocks[0]))
    blocks = [{f"model.layers.{index}.{name}": shape for name, shape in blocks[0].items()} for index in range(layers)]
    weight_map = {}
    for number, shapes in enumerate(tqdm([*blocks, *({name: shape} for name, shape in ends.items())], desc="writing")):
        name = f"model-{number:05d}.safetensors"
        tensors = {key: torch.randn(shape) * 0.02 for key, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32", **WIDTH}
    fields |= {"vocab_size": VOCABULARY, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(fields))
    largest = max(bytes_of(blocks[0]), *(bytes_of({name: shape}) for name, shape in ends.items()))
    total = sum(map(bytes_of, blocks)) + bytes_of(ends)
    return {"parameters": total // 4, "source_bytes": total, "largest_block_bytes": largest}


def block_shapes() -> dict[str, tuple[int, ...]]:
    hidden, wide, keys = WIDTH["hidden_size"], WIDTH["intermediate_size"], 64 * WIDTH["num_key_value_heads"]
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
    }


def bytes_of(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(4 * torch.Size(shape).numel() for shape in shapes.values())


if __name__ == "__main__":
    main()
