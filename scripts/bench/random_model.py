"""A random model of the 1.1 B shape in bf16, to measure speed with: 22 layers, 2048 wide, 5632 in the feed-forward.

    python scripts/bench/random_model.py TOKENIZER OUTPUT

TOKENIZER is a folder whose byte-pair tokenizer (`tokenizer.json`) has at least 32,000 tokens; the model takes the first
32,000 of them. Needs 7 GB on disk, of which 2.2 stay.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from convert_memory import VOCABULARY, write_checkpoint

from hf_llmkernel.convert import convert_checkpoint

SIZE = 4_420_000_000  # bytes in fp32: 22 layers, table and head


def main() -> None:
    tokenizer, output = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="random_model-", dir=output.parent) as scratch:
        source = Path(scratch) / "source"
        write_checkpoint(source, SIZE)
        cut_tokenizer(tokenizer, source)
        convert_checkpoint(source, output, dtype="bfloat16")


def cut_tokenizer(folder: Path, target: Path) -> None:
    """The first tokens alone, and the merges that make no others."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < VOCABULARY}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= model["vocab"].keys()]
    (target / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    shutil.copy(folder / "tokenizer_config.json", target)


if __name__ == "__main__":
    main()
