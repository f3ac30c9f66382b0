"""A checkpoint of this family with floating weights in place of its integers, to train from: the rest stays as it is.

Sparse linears keep their masks and low-rank ones their ranks, and layers what they have of their own: only integers
do not train.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import output_folder
from ..model import modeling_llm_kernel
from ..model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ..model.linear_llm_kernel import unpack_mask
from .conversion import Conversion, count_parameters, write_tensors
from .derived import Derived, DerivedTensors
from .families import describe_stored
from .matrices import Matrix
from .names import HEADS, Plan, canonical, tensors_of
from .own_checkpoint import OwnCheckpoint, read_own_config
from .source import copy_companions, has_tokenizer


def dequantize_own(
    folder: Path, output: Path, dtype: torch.dtype | None, shard_bytes: int, progress: bool
) -> Conversion:
    """Writes a folder of this family anew, its integers as floating weights, some rows at a time.

    Args:
        folder: of this family.
        output: a new or empty folder.
        dtype: of what is floating; by default the checkpoint's.
        shard_bytes, progress: as `convert_checkpoint`.

    Raises:
        ValueError: a damaged checkpoint, one without integers, or values beyond the range of the dtype.
    """
    started = time.monotonic()
    before = read_own_config(folder)
    own = OwnCheckpoint(folder, before)
    integers = {part.path: part for matrix in own.computed() for part in matrix.parts() if part.form.bits < 16}
    if not integers:
        raise ValueError(f"{folder}: stores no integers, so there is nothing to dequantize; use it as it is.")
    config = _floating_config(before)
    config.dtype = dtype = dtype or own.dtype
    made, _ = tensors_of(getattr(modeling_llm_kernel, f"LLMKernel{HEADS[own.head].suffix}"), config)
    tensors = DerivedTensors({name: _entry(own, integers, name) for name in made})
    plan = Plan({name: name for name in made}, own.plan.dropped)
    with output_folder(output) as part:
        files, precision = write_tensors(tensors, plan, part, dtype, shard_bytes, progress, "converting")
        copy_companions(folder, part)
        config.save_pretrained(part)
    first = next(iter(integers.values()))
    return Conversion(
        source=str(folder),
        output=str(output),
        family=config.model_type,
        architecture=(config.architectures or [""])[0],
        dtype=str(dtype).removeprefix("torch."),
        parameters=count_parameters(tensors, plan, config),
        bytes=sum((output / name).stat().st_size for name in files),
        files=files,
        tokenizer=has_tokenizer(output),
        dropped=own.plan.dropped,
        notes=[f"{len(integers)} matrices of integers are dequantized ({first.label}: {describe_stored(first.form)})"],
        precision=precision,
        seconds=round(time.monotonic() - started, 2),
    )


def _entry(own: OwnCheckpoint, integers: dict[str, Matrix], name: str) -> Derived:
    """A tensor of the new checkpoint: computed where it was integers, else as it is stored."""
    path, _, suffix = canonical(name).rpartition(".")
    matrix = integers.get(path)
    if matrix is None or suffix not in ("weight", "values"):
        return own.entry(canonical(name))
    if suffix == "weight":
        return Derived(matrix.shape, torch.float32, own.file(matrix), partial(own.row_blocks, matrix))
    shape = _floating_form(matrix.form).values_shape(*matrix.shape)
    return Derived(shape, torch.float32, own.file(matrix), partial(_kept_values, own, matrix))


def _kept_values(own: OwnCheckpoint, matrix: Matrix) -> Iterator[torch.Tensor]:
    """The values that a sparse matrix keeps, row after row as its floating form stores them."""
    mask, first = own.stored(matrix, ["mask"])["mask"], 0
    for rows in own.row_blocks(matrix):
        yield rows[unpack_mask(mask[first : first + len(rows)], matrix.shape[1])]
        first += len(rows)


def _floating_form(form: LinearForm) -> LinearForm:
    """The same form with floating values, of factors too; one that is dense then needs no form."""
    plain = LinearForm()
    floating = {side: _floating_form(own) for side, own in (("a", form.a), ("b", form.b)) if own is not None}
    factors = {side: None if own == plain else own for side, own in floating.items()}
    named = {name: getattr(plain, name) for name in ("group_size", "symmetric", "zero_point_dtype", "scale_dtype")}
    return replace(form, bits=16, **named, **factors)


def _floating_config(config: LLMKernelConfig) -> LLMKernelConfig:
    """The configuration with every form floating."""
    fields = config.to_dict()
    for name in ("embed_tokens_form", "lm_head_form"):
        fields[name] = _floating_fields({name: fields.get(name)}).get(name)
    for own in (fields, *(fields.get("per_layer_config") or {}).values()):
        if own.get("linear_forms") is not None:
            own["linear_forms"] = _floating_fields(own["linear_forms"])
    return LLMKernelConfig.from_dict(fields)


def _floating_fields(forms: dict[str, Any]) -> dict[str, Any]:
    """Forms by name as a configuration has them; what is dense then is left out."""
    floating = {name: _floating_form(LinearForm.from_dict(form)) for name, form in forms.items()}
    return {name: form.to_dict() for name, form in floating.items() if form != LinearForm()}
