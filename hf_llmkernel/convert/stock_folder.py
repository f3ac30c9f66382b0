"""A checkpoint of this family as the folder of a stock architecture, tensor by tensor."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers

from ..checkpoint import output_folder
from .conversion import Conversion, count_values, write_tensors
from .derived import Derived, DerivedTensors
from .families import Family, describe_stored, obstacles, refuse_obstacles, to_stock, unfit_unless_dense
from .matrices import Matrix
from .names import HEADS, Plan, Tensors, canonical, tensors_of
from .own_checkpoint import OwnCheckpoint, read_own_config
from .source import copy_companions, has_tokenizer

DEQUANTIZE = "pass dequantize (--dequantize) to write what it stands for as floating weights"


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
    dequantize: bool = False


def export_stock(family: Family, export: Export) -> Conversion:
    """Writes a folder that a family's stock class loads; what is not dense is made so where that was asked for."""
    started = time.monotonic()
    config = read_own_config(export.folder)
    remedy = "export a checkpoint without it, or to a family that has it"
    refuse_obstacles(list(obstacles(config, family, unfit=lambda _: None)), export.to, remedy)
    if not export.dequantize:
        refuse_obstacles(list(obstacles(config, family, unfit_unless_dense)), export.to, DEQUANTIZE)
    own = OwnCheckpoint(export.folder, config)
    stock = to_stock(config, family)
    model_class = getattr(transformers, family.prefix + HEADS[own.head].suffix)
    stock.architectures = [model_class.__name__]
    computed = own.computed()
    dtype = export.dtype or (own.dtype if computed else None)
    stock.dtype = dtype or stock.dtype
    entries = _dense_entries(own, tensors_of(model_class, stock)[0])
    tensors, plan = DerivedTensors(entries), Plan({name: name for name in entries}, own.plan.dropped)
    parameters = sum(count_values(tensors, name) for name in entries)
    return write_stock(export, stock, tensors, plan, dtype, parameters, started, _notes(computed))


def _dense_entries(own: OwnCheckpoint, made: dict[str, torch.Tensor]) -> dict[str, Derived]:
    """The tensors of a stock class: those of a checkpoint, and in fp32 what others stand for, some rows at a time."""
    computed = {matrix.path: matrix for matrix in own.computed()}
    entries = {}
    for name in made:
        path, _, suffix = canonical(name).rpartition(".")
        matrix = computed.get(path)
        if matrix is not None and suffix == "weight":
            read = partial(own.row_blocks, matrix)
            entries[name] = Derived(matrix.shape, torch.float32, own.file(matrix), read)
            continue
        factor = "b." if matrix is not None and matrix.form.rank is not None else ""
        entries[name] = own.entry(f"{path}.{factor}{suffix}")
    return entries


def _notes(computed: list[Matrix]) -> list[str]:
    """What was made of matrices that are not dense, one note a kind."""
    kinds = {
        "matrices of integers are dequantized": [matrix for matrix in computed if matrix.form.bits < 16],
        "sparse matrices are stored with their zeros": [matrix for matrix in computed if matrix.form.sparsity],
        "low-rank matrices are multiplied out": [matrix for matrix in computed if matrix.form.rank],
    }
    counted = [(len(found), done, found[0]) for done, found in kinds.items() if found]
    return [f"{count} {done} ({first.label}: {describe_stored(first.form)})" for count, done, first in counted]


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
