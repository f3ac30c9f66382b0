"""A checkpoint of this family as the folder of a stock architecture, tensor by tensor."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from ..checkpoint import CheckpointReader, output_folder
from .conversion import Conversion, count_values, write_tensors
from .families import Family, obstacles, refuse_obstacles, to_stock, unfit_unless_dense
from .names import HEADS, Plan, Tensors, head_of, plan_copies, tensors_of
from .own_checkpoint import read_own_config
from .source import copy_companions, has_tokenizer


@dataclass(frozen=True)
class Export:
    """What is exported, and how: the arguments of `export_checkpoint`, checked."""

    folder: Path
    output: Path
    to: str
    shard_bytes: int
    progress: bool
    dtype: torch.dtype | None = None
    type: str | None = None
    embedding_type: str | None = None


def export_stock(family: Family, export: Export) -> Conversion:
    """Writes a folder that a family's stock class loads; every linear must be dense."""
    started = time.monotonic()
    config = read_own_config(export.folder)
    remedy = "export a checkpoint without it, or to a family that has it"
    refuse_obstacles(list(obstacles(config, family, unfit_unless_dense)), export.to, remedy)
    stock = to_stock(config, family)
    where = str(export.folder / "config.json")
    tensors = CheckpointReader(export.folder)
    head = head_of(config.architectures, "LLMKernel", tensors.keys(), where)
    model_class = getattr(transformers, family.prefix + HEADS[head].suffix)
    stock.architectures = [model_class.__name__]
    stock.dtype = export.dtype or stock.dtype
    plan = plan_copies(tensors, *tensors_of(model_class, stock), False, where)
    parameters = sum(count_values(tensors, key) for key in plan.copies.values())
    return write_stock(export, stock, tensors, plan, export.dtype, parameters, started)


def write_stock(
    export: Export,
    stock: transformers.PreTrainedConfig,
    tensors: Tensors,
    plan: Plan,
    dtype: torch.dtype | None,
    parameters: int,
    started: float,
    notes: list[str] | None = None,
) -> Conversion:
    """Writes the tensors of a plan, a stock configuration, and the files that travel with them."""
    with output_folder(export.output) as part:
        files, precision = write_tensors(tensors, plan, part, dtype, export.shard_bytes, export.progress, "exporting")
        copy_companions(export.folder, part)
        stock.save_pretrained(part)
    return Conversion(
        source=str(export.folder),
        output=str(export.output),
        family=stock.model_type,
        architecture=(stock.architectures or [""])[0],
        dtype=str(stock.dtype).removeprefix("torch."),
        parameters=parameters,
        bytes=sum((export.output / name).stat().st_size for name in files),
        files=files,
        tokenizer=has_tokenizer(export.output),
        dropped=plan.dropped,
        notes=notes or [],
        precision=precision,
        seconds=round(time.monotonic() - started, 2),
    )
