"""A checkpoint of this family as exports read it: found whole, and each of its matrices by form.

Shapes: O out_features, I in_features, G groups of columns.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import CheckpointReader
from ..checkpoint.bitsandbytes import BitsAndBytes
from ..checkpoint.model_folder import in_fp32
from ..checkpoint.precision import check_products
from ..checkpoint.reader import BLOCK_BYTES
from ..model import modeling_llm_kernel
from ..model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ..model.linear_llm_kernel import (
    INT4_OFFSET,
    check_mask,
    expand_groups,
    row_starts,
    unpack_mask,
    unpack_nibbles,
    unpack_rows,
)
from .derived import Derived
from .families import CONFIG_ERRORS, one_line
from .matrices import Matrix, matrices
from .names import HEADS, canonical, head_of, plan_copies, tensors_of
from .source import read_config_fields


class OwnCheckpoint:
    """The configuration and tensors of a folder of this family.

    Args:
        folder: with config.json and safetensors.
        config: as `read_own_config` gives it.

    Raises:
        ValueError: tensors that are missing, unexpected, or of another shape or dtype than the configuration makes.
    """

    def __init__(self, folder: Path, config: LLMKernelConfig):
        self.folder = folder
        self.config = config
        self.reader = CheckpointReader(folder)
        where = str(folder / "config.json")
        self.head = head_of(config.architectures, "LLMKernel", self.reader.keys(), where)
        model_class = getattr(modeling_llm_kernel, f"LLMKernel{HEADS[self.head].suffix}")
        self.plan = plan_copies(self.reader, *tensors_of(model_class, config), False, where)
        self.keys = {canonical(name): key for name, key in self.plan.copies.items()}  # by the name without prefix

    @property
    def dtype(self) -> torch.dtype:
        """Of what is floating."""
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else self.reader.dtype(self.keys["norm.weight"])

    def stored(self, matrix: Matrix, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """The stored tensors of a matrix by suffix, by default all but the bias.

        Raises:
            ValueError: a mask that contradicts the form.
        """
        names = matrix.form.stored_tensors(*matrix.shape) if names is None else names
        wanted = [name for name in names if name != "bias"]
        stored = {name: self._tensor(matrix, name) for name in wanted}
        if "mask" in stored:
            try:
                check_mask(stored["mask"], matrix.form, matrix.shape[1])
            except ValueError as error:
                raise ValueError(f"{matrix.path}.{error}") from None
        return stored

    def stored_dtype(self, matrix: Matrix) -> torch.dtype:
        """Of a floating matrix; of one that has to be computed, float32."""
        if matrix.form.bits < 16 or matrix.form.rank is not None:
            return torch.float32
        return self.reader.dtype(self.keys[f"{matrix.path}.{'weight' if matrix.form.is_dense else 'values'}"])

    def check_products(self, dtype: torch.dtype) -> None:
        """Raises `ValueError` where a matrix that is not dense stands for values that a dtype does not hold."""
        for matrix in self.computed():
            check_products(matrix.label, matrix.form, matrix.shape, dtype, partial(self._tensor, matrix))

    def computed(self) -> list[Matrix]:
        """Its matrices that are not dense."""
        found = (matrix for matrix in matrices(self.config) if not matrix.form.is_dense)
        return [matrix for matrix in found if self._first_name(matrix) in self.keys]  # the head may be another class's

    def file(self, matrix: Matrix) -> Path:
        """The file that holds a matrix."""
        return self.reader.file(self.keys[self._first_name(matrix)])

    def _first_name(self, matrix: Matrix) -> str:
        return f"{matrix.path}.{next(iter(matrix.form.stored_tensors(*matrix.shape)))}"

    def _tensor(self, matrix: Matrix, suffix: str) -> torch.Tensor:
        return self.reader.tensor(self.keys[f"{matrix.path}.{suffix}"])

    def entry(self, name: str) -> Derived:
        """A tensor as it is stored, by its name without the prefix of the body."""
        key, reader = self.keys[name], self.reader
        return Derived(reader.shape(key), reader.dtype(key), reader.file(key), partial(reader.blocks, key))

    def row_blocks(self, matrix: Matrix) -> Iterator[torch.Tensor]:
        """Its dense weight in fp32, some rows `[n, I]` at a time."""
        yield from _row_blocks(in_fp32(self.stored(matrix)), matrix.form, *matrix.shape)

    def weight(self, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        """Its dense weight `[O, I]`, computed in fp32."""
        return torch.cat([rows.to(dtype) for rows in self.row_blocks(matrix)])


def _row_blocks(
    stored: dict[str, torch.Tensor], form: LinearForm, rows: int, in_features: int
) -> Iterator[torch.Tensor]:
    """Rows `[n, I]` of what a matrix stands for, in fp32."""
    if form.rank is not None:
        (a, b), parts = form.factors, {"a": {}, "b": {}}
        for name, tensor in stored.items():
            parts[name[0]][name[2:]] = tensor
        first = torch.cat(list(_row_blocks(parts["a"], a, form.rank, in_features)))
        yield from (piece @ first for piece in _row_blocks(parts["b"], b, rows, form.rank))
        return
    step = max(BLOCK_BYTES // (4 * in_features), 1)
    if form.is_dense:
        yield from stored["weight"].split(step)
        return
    starts = row_starts(stored["mask"]) if form.sparsity == "bitmask" else None
    for chosen in torch.arange(rows).split(step):
        yield unpack_rows(stored, form, in_features, torch.float32, chosen, starts)


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
        config = LLMKernelConfig.from_dict(fields)
    except CONFIG_ERRORS as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    if quantization := BitsAndBytes.of(config):
        raise ValueError(
            f"{path}: the linears are stored as {quantization.words}, of which no tensor is read here; give the "
            "checkpoint they were made from, or load it, dequantize() and save it first."
        )
    return config


def dense_codes(stored: dict[str, torch.Tensor], form: LinearForm, in_features: int) -> torch.Tensor:
    """The codes `[O, I]` of an integer form as bytes: int8 where 8-bit symmetric, else uint8.

    Where a sparse form keeps nothing stands the code of zero: the zero point, symmetric 4-bit codes' offset, or 0.

    Raises:
        ValueError: a sparse form whose zero points are no integers, so that no code is zero.
    """
    values = stored["values"]
    if form.bits == 4:
        values = unpack_nibbles(values, form.values_shape(len(stored["scales"]), in_features)[-1])
    if "mask" not in stored:
        return values
    mask = unpack_mask(stored["mask"], in_features)
    if form.symmetric:
        zeros = values.new_full(mask.shape, INT4_OFFSET if form.bits == 4 else 0)
    elif form.zero_point_dtype == "uint8":
        zeros = expand_groups(stored["zero_points"], in_features, form.group_size).to(torch.uint8)
    else:
        raise ValueError(f"zero points of {form.zero_point_dtype} have no code for zero; store it dense.")
    return zeros.masked_scatter(mask, values)
