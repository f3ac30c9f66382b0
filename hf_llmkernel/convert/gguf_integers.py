"""A GGUF file's integers as this family's forms, codes bit-equal; what has no form here is dequantized.

Shapes: N rows, I in_features, B blocks of a row.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..checkpoint.reader import check_finite
from ..model.linear_llm_kernel import pack_nibbles
from . import gguf_blocks as ggml
from .derived import Derived, DerivedTensors
from .gguf_file import GGUFFile
from .matrices import Matrix
from .names import canonical


def open_integers(file: GGUFFile) -> tuple[DerivedTensors, list[Matrix], list[str]]:
    """The tensors of a file under this family's names.

    Returns:
        The tensors, those that float in the dtype they are stored in; the matrices whose codes are kept; and notes of
        those that are dequantized.
    """
    entries: dict[str, Derived] = {}
    kept: list[Matrix] = []
    others: list[str] = []
    for key, tensor in file.packed.items():
        stem, _, suffix = key.rpartition(".")
        if suffix == "weight" and len(tensor.shape) == 2 and tensor.kind in ggml.FORMS:
            rows, columns = tensor.shape
            kept.append(Matrix(canonical(key).removesuffix(".weight"), stem, ggml.FORMS[tensor.kind], (rows, columns)))
            entries |= _integer_entries(file, key, kept[-1])
        else:
            dtype = ggml.FLOATING.get(tensor.kind, file.dtype(key))
            entries[key] = Derived(file.shape(key), dtype, file.path, partial(_floating_pieces, file, key, dtype))
            others += [f"{stem} ({file.type_name(key)})"] if tensor.kind not in ggml.FLOATING else []
    notes = [f"dequantized, for this family has no such form: {', '.join(others)}"] if others else []
    return DerivedTensors(entries), kept, notes


def _integer_entries(file: GGUFFile, key: str, matrix: Matrix) -> dict[str, Derived]:
    parts: dict[str, Callable[[ggml.Blocks], torch.Tensor | None]] = {
        "values": lambda blocks: pack_nibbles(blocks.codes) if matrix.form.bits == 4 else blocks.codes,
        "scales": lambda blocks: blocks.scales,
        "zero_points": lambda blocks: blocks.offsets,
    }
    return {
        f"{matrix.label}.{name}": Derived(
            shape, getattr(torch, str(dtype)), file.path, partial(_pieces, file, key, parts[name])
        )
        for name, (shape, dtype) in matrix.form.stored_tensors(*matrix.shape).items()
    }


def _floating_pieces(file: GGUFFile, key: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A floating tensor, some rows at a time, in a dtype that holds its values."""
    yield from (block.to(dtype) for block in file.blocks(key))


def _pieces(file: GGUFFile, key: str, part: Callable[[ggml.Blocks], torch.Tensor | None]) -> Iterator[torch.Tensor]:
    """One part of a matrix's blocks, some rows at a time. Raises `ValueError` for scales that are not finite."""
    kind = file.packed[key].kind
    for packed in file.packed_rows(key):
        blocks = ggml.unpack_blocks(packed, kind)
        check_finite(key, blocks.scales, file.path)
        if blocks.offsets is not None:
            check_finite(key, blocks.offsets, file.path)
            blocks = ggml.zero_points_of(blocks)
        piece = part(blocks)
        assert piece is not None
        yield piece
