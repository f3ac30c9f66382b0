"""What a conversion did, and the copying of its tensors: a stream from one checkpoint into another one."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoint import CheckpointWriter, check_disk_space, is_finite
from ..checkpoint.precision import cast_values
from ..model.configuration_llm_kernel import LLMKernelConfig
from .matrices import matrices
from .names import Plan, Tensors, canonical

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL_FILES_BYTES = 64 << 20  # what a tokenizer and the payload take at most
EXACT_SUFFIXES = ("scales", "zero_points")
PACKED_SUFFIXES = ("values", "mask", *EXACT_SUFFIXES)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; `to_dict` is what the command prints."""

    source: str
    output: str
    family: str
    architecture: str
    dtype: str
    parameters: int
    bytes: int
    files: list[str]
    tokenizer: bool
    dropped: list[str] = field(default_factory=list)
    ignored_fields: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # What casting lost, counted: `dtype`, `values`, `underflowed`, `subnormal`; of a GGUF file `dtype` are the types
    # that matrices were rounded to, and `matrices` how many were.
    precision: dict[str, Any] | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its name. Raises `ValueError` for one that is not of `DTYPES`."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype={name}: is not one of {list(DTYPES)}; choose one, or leave it to the source.")
    return None if name is None else DTYPES[name]


def count_values(tensors: Tensors, key: str) -> int:
    """How many values a tensor of a source has."""
    return torch.Size(tensors.shape(key)).numel()


def count_parameters(tensors: Tensors, plan: Plan, config: LLMKernelConfig) -> int:
    """How many weights a plan writes, a packed matrix counted as the dense one that it stands for."""
    dense = (key for name, key in plan.copies.items() if name.rpartition(".")[2] not in PACKED_SUFFIXES)
    parts = (part for matrix in matrices(config) for part in matrix.parts())
    written = {canonical(name) for name in plan.copies}
    packed = (math.prod(part.shape) for part in parts if f"{part.path}.values" in written)
    return sum(count_values(tensors, key) for key in dense) + sum(packed)


def write_tensors(
    tensors: Tensors,
    plan: Plan,
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    progress: bool,
    verb: str,
) -> tuple[list[str], dict[str, Any] | None]:
    """Copies the tensors of a plan piece by piece, cast if a dtype is given.

    Returns:
        The names of the files, and `Conversion.precision`.

    Raises:
        ValueError: a tensor that is not finite, before or after the cast.
        OSError: no space for all of it, found out before the first byte.
    """
    kept = {name: _written_dtype(name, tensors.dtype(key), dtype) for name, key in plan.copies.items()}
    sizes = {name: count_values(tensors, key) * kept[name].itemsize for name, key in plan.copies.items()}
    check_disk_space(folder, sum(sizes.values()) + SMALL_FILES_BYTES)
    writer = CheckpointWriter(folder, shard_bytes)
    lost: Counter[str] = Counter()
    bar = tqdm(total=sum(sizes.values()), desc=verb, unit="B", unit_scale=True, mininterval=0.5, disable=not progress)
    with bar, writer:
        for name, key in plan.copies.items():
            blocks = _cast(tensors.blocks(key), key, kept[name], tensors.file(key), lost)
            writer.add_blocks(name, kept[name], tensors.shape(key), _counted(blocks, bar.update))
    counts = {name: lost[name] for name in ("values", "underflowed", "subnormal")}
    precision = {"dtype": str(dtype).removeprefix("torch."), **counts} if lost["values"] else None
    return sorted(path.name for path in folder.glob("*.safetensors")), precision


def _written_dtype(name: str, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """A cast concerns what is floating, but for scales and zero points, whose dtype is part of their form."""
    exact = not stored.is_floating_point or name.rpartition(".")[2] in EXACT_SUFFIXES
    return stored if dtype is None or exact else dtype


def _cast(
    blocks: Iterator[torch.Tensor], key: str, dtype: torch.dtype, file: Path, lost: Counter[str]
) -> Iterator[torch.Tensor]:
    """The pieces of a tensor in a dtype; `lost` counts the values cast, and what they lost."""
    for block in blocks:
        if block.dtype == dtype:
            yield block
            continue
        cast, counts = cast_values(block, dtype)
        if counts["overflowed"] or not is_finite(cast):
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"dtype={name}: {key} in {file} has values beyond its range; choose bfloat16 or float32.")
        lost.update({"values": block.numel(), **counts})
        yield cast


def _counted(blocks: Iterator[torch.Tensor], advance: Callable[[int], Any]) -> Iterator[torch.Tensor]:
    for block in blocks:
        yield block
        advance(block.nbytes)
