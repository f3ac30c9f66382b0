"""This family's checkpoints out: as a stock Llama, Mistral, Qwen2 or Qwen3, dense or with packed integers, or as GGUF.

What came in goes out bit-equal, unless it is to be dequantized. What a target cannot express is refused by name, before
any work.
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
from .gguf_blocks import TYPES
from .gguf_folder import export_gguf
from .source import check_companions
from .stock_folder import Export, export_stock

GGUF = "gguf"
Exporter = Callable[[Export], Conversion]
# One row a target.
EXPORTERS: dict[str, Exporter] = {
    **{name: partial(export_stock, family) for name, family in FAMILIES.items()},
    METHOD: export_compressed,
    GGUF: export_gguf,
}


def export_checkpoint(
    model_dir: str | Path,
    output_dir: str | Path,
    to: str,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
    dtype: str | torch.dtype | None = None,
    type: str | None = None,
    embedding_type: str | None = None,
    dequantize: bool = False,
) -> Conversion:
    """Writes a checkpoint of this family in a format that other tools know.

    Args:
        model_dir: a folder of this family.
        output_dir: a new or empty folder; it appears when everything in it is complete.
        to: one of `EXPORTERS`: `"llama"`, `"mistral"`, `"qwen2"`, `"qwen3"`, `"compressed-tensors"`, `"gguf"`.
        shard_bytes: most bytes of one file written.
        progress: whether to show a bar on stderr.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, of what is stored floating; by default the checkpoint's own,
            and for compressed-tensors, which has one for scales and all else, that of the scales.
        type: of the matrices of a GGUF file: `"Q8_0"`, `"Q4_0"`, `"Q4_1"`, `"F16"`, `"BF16"` or `"F32"`. Those on the
            grid of this type keep their codes, others are dequantized and rounded to it. By default every matrix has
            the type of its own form.
        embedding_type: the same for embedding and head alone.
        dequantize: of a stock architecture: write what is stored otherwise as floating weights, integers dequantized,
            sparse matrices with their zeros, low ranks multiplied out. By default that is refused.

    Raises:
        ValueError: bad input, or what stands in the way: layer, and form or field, and the remedy.
        OSError: no space.
    """
    if to not in EXPORTERS:
        raise ValueError(f"to={to!r}: is not one of {list(EXPORTERS)}; choose one of these.")
    _check_types(to, dtype, {"type": type, "embedding_type": embedding_type})
    if dequantize and to not in FAMILIES:
        raise ValueError(f"dequantize: is of {list(FAMILIES)}, and to={to}; leave it out, or export to one of these.")
    output = Path(output_dir).expanduser()
    check_output(output)
    folder, kind = Path(model_dir).expanduser(), check_dtype(dtype)
    check_companions(folder)
    return EXPORTERS[to](Export(folder, output, to, shard_bytes, progress, kind, type, embedding_type, dequantize))


def _check_types(to: str, dtype: str | torch.dtype | None, types: dict[str, str | None]) -> None:
    """Raises `ValueError` for an unknown type of GGUF, or one for another target; or a dtype for GGUF."""
    if to == GGUF and dtype is not None:
        raise ValueError(f"dtype={dtype}: a GGUF file has types; choose one by type (--type F16).")
    for name, value in types.items():
        if value is not None and to != GGUF:
            raise ValueError(f"{name}={value}: is of GGUF files, and to={to}; choose a dtype (--dtype) instead.")
        if value is not None and value not in TYPES:
            raise ValueError(f"{name}={value}: is not one of {list(TYPES)}; choose one of these.")
