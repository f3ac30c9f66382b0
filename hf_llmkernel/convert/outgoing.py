"""This family's checkpoints out: as a stock Llama, Mistral, Qwen2 or Qwen3, dense or with packed integers, or as GGUF.

What came in goes out bit-equal. What a target cannot express is refused by name, before any work.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import check_output
from ..checkpoint.writer import SHARD_BYTES
from .compressed_folder import export_compressed
from .compressed_tensors import METHOD
from .conversion import Conversion, check_dtype
from .families import FAMILIES
from .stock_folder import Export, export_stock

Exporter = Callable[[Export], Conversion]
# One row a target.
EXPORTERS: dict[str, Exporter] = {
    **{name: partial(export_stock, family) for name, family in FAMILIES.items()},
    METHOD: export_compressed,
}


def export_checkpoint(
    model_dir: str | Path,
    output_dir: str | Path,
    to: str,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
    dtype: str | torch.dtype | None = None,
) -> Conversion:
    """Writes a checkpoint of this family in a format that other tools know.

    Args:
        model_dir: a folder of this family.
        output_dir: a new or empty folder; it appears when everything in it is complete.
        to: one of `EXPORTERS`: `"llama"`, `"mistral"`, `"qwen2"`, `"qwen3"`, `"compressed-tensors"`.
        shard_bytes: most bytes of one file written.
        progress: whether to show a bar on stderr.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, of what is stored floating; by default the checkpoint's own,
            and for compressed-tensors, which has one for scales and all else, that of the scales.

    Raises:
        ValueError: bad input, or what stands in the way: layer, and form or field, and the remedy.
        OSError: no space.
    """
    if to not in EXPORTERS:
        raise ValueError(f"to={to!r}: is not one of {list(EXPORTERS)}; choose one of these.")
    output = Path(output_dir).expanduser()
    check_output(output)
    return EXPORTERS[to](Export(Path(model_dir).expanduser(), output, to, shard_bytes, progress, check_dtype(dtype)))
