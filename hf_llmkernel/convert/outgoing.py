"""Stock architectures out: a dense checkpoint of this family becomes a Llama, Mistral, Qwen2 or Qwen3 one again.

What came in by `convert_checkpoint` goes out bit-equal. What a stock architecture cannot express is refused by name.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import transformers

from ..checkpoint import CheckpointReader, check_output, output_folder
from ..checkpoint.writer import SHARD_BYTES
from ..model.configuration_llm_kernel import LLMKernelConfig
from .families import CONFIG_ERRORS, FAMILIES, Family, one_line, to_stock
from .incoming import Conversion, count_values, read_config_fields, write_tensors
from .names import HEADS, head_of, plan_copies, tensors_of
from .source import copy_companions, has_tokenizer

Exporter = Callable[[Path, Path, int, bool], Conversion]


def export_checkpoint(
    model_dir: str | Path,
    output_dir: str | Path,
    to: str,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> Conversion:
    """Writes a checkpoint of this family in a format that other tools know.

    Args:
        model_dir: a folder of this family.
        output_dir: a new or empty folder; it appears when everything in it is complete.
        to: one of `EXPORTERS`: `"llama"`, `"mistral"`, `"qwen2"`, `"qwen3"`.
        shard_bytes: most bytes of one file written.
        progress: whether to show a bar on stderr.

    Raises:
        ValueError: bad input, or what stands in the way: layer, and form or field, and the remedy.
        OSError: no space.
    """
    if to not in EXPORTERS:
        raise ValueError(f"to={to!r}: is not one of {list(EXPORTERS)}; choose one of these.")
    check_output(output_dir)
    return EXPORTERS[to](Path(model_dir), Path(output_dir), shard_bytes, progress)


def read_own_config(folder: Path) -> LLMKernelConfig:
    """The configuration of a folder of this family. Raises `ValueError` where it is another's or is damaged."""
    path = folder / "config.json"
    fields = read_config_fields(path)
    if fields.get("model_type") != LLMKernelConfig.model_type:
        raise ValueError(
            f"{path}: model_type={fields.get('model_type')!r} is not {LLMKernelConfig.model_type!r}; give a folder "
            "that `llmkernel convert` or `compress` wrote."
        )
    try:
        return LLMKernelConfig.from_dict(fields)
    except CONFIG_ERRORS as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def _export_stock(family: Family, folder: Path, output: Path, shard_bytes: int, progress: bool) -> Conversion:
    started = time.monotonic()
    config = read_own_config(folder)
    where = str(folder / "config.json")
    stock = to_stock(config, family)
    tensors = CheckpointReader(folder)
    head = head_of(config.architectures, "LLMKernel", tensors.keys(), where)
    model_class = getattr(transformers, family.prefix + HEADS[head].suffix)
    stock.architectures = [model_class.__name__]
    plan = plan_copies(tensors, *tensors_of(model_class, stock), False, where)
    with output_folder(output) as part:
        files = write_tensors(tensors, plan, part, None, shard_bytes, progress, "exporting")
        copy_companions(folder, part)
        stock.save_pretrained(part)
    return Conversion(
        source=str(folder),
        output=str(output),
        family=family.model_type,
        architecture=model_class.__name__,
        dtype=str(stock.dtype).removeprefix("torch."),
        parameters=sum(count_values(tensors, key) for key in plan.copies.values()),
        bytes=sum((output / name).stat().st_size for name in files),
        files=files,
        tokenizer=has_tokenizer(output),
        dropped=plan.dropped,
        seconds=round(time.monotonic() - started, 2),
    )


# One row a target; a row needs no more than the folder, the output, the size of shards and whether to show progress.
EXPORTERS: dict[str, Exporter] = {name: partial(_export_stock, family) for name, family in FAMILIES.items()}
