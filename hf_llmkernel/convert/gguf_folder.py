"""A checkpoint of this family as a GGUF file that llama.cpp runs: `model.gguf` in a folder of its own.

Integers whose grid a type of ggml has go out with the same codes; everything else in the type that is asked for. Layers
may have widths and heads of their own. Memory holds one linear, or some rows of the embedding, at a time.

Shapes: O out_features, I in_features.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

import gguf
import numpy as np
import torch
from tqdm import tqdm

from ..checkpoint import check_disk_space, is_finite, output_folder
from ..checkpoint.precision import cast_values
from ..checkpoint.reader import BLOCK_BYTES
from ..checkpoint.writer import sync
from ..model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from . import gguf_blocks as ggml
from .conversion import SMALL_FILES_BYTES, Conversion
from .families import describe_form, refuse_obstacles
from .gguf_file import LAYER_NAMES, ROTATED, TOP_NAMES, interleave
from .gguf_metadata import INTERLEAVED, architecture_of, metadata, obstacles, rope_factors
from .gguf_vocabulary import Vocabulary
from .matrices import Matrix, matrices
from .own_checkpoint import OwnCheckpoint, dense_codes, read_own_config
from .source import TERMS, copy_companions, has_tokenizer
from .stock_folder import Export

FILE = "model.gguf"
REMEDY = "choose a type for what has none (--type F16), or export a checkpoint without it"
ENDS = ("embed_tokens", "lm_head")
LAYERS = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
TOPS = {ours.removeprefix("model."): theirs for theirs, ours in TOP_NAMES.items()}
FILE_TYPES = {ggml.F32: 0, ggml.F16: 1, ggml.Q4_0: 2, ggml.Q4_1: 3, ggml.Q8_0: 7, ggml.BF16: 32}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its name there, type, shape, and what reads its bytes piece by piece."""

    name: str
    kind: int
    shape: tuple[int, ...]
    read: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * ggml.row_bytes(self.kind, self.shape[-1])


def export_gguf(export: Export) -> Conversion:
    """Writes a GGUF file of a causal model.

    Raises:
        ValueError: what llama.cpp cannot run, or a form that has no type of ggml, where none was chosen for it.
    """
    started = time.monotonic()
    config = read_own_config(export.folder)
    refuse_obstacles([*obstacles(config), *_form_obstacles(config, export)], export.to, REMEDY)
    kinds = {matrix.path: kind_of(matrix, config, export) or ggml.F32 for matrix in matrices(config)}
    own = OwnCheckpoint(export.folder, config)
    if own.head != "causal-lm":
        raise ValueError(f"to={export.to}: the checkpoint has the head {own.head!r}, and llama.cpp a language model's.")
    refuse_obstacles(_inexact_scales(own, kinds), export.to, REMEDY)
    vocabulary = Vocabulary(export.folder, config.vocab_size) if has_tokenizer(export.folder) else None
    architecture = architecture_of(config)
    lost: Counter[str] = Counter()
    entries = _entries(own, kinds, architecture in INTERLEAVED, lost)
    check_disk_space(export.output, sum(entry.nbytes for entry in entries) + SMALL_FILES_BYTES)
    with output_folder(export.output) as part:
        _write(part / FILE, _header(config, architecture, vocabulary, kinds), entries, export.progress)
        copy_companions(export.folder, part, TERMS)
    return Conversion(
        source=str(export.folder),
        output=str(export.output),
        family=architecture,
        architecture=architecture,
        dtype=", ".join(dict.fromkeys(ggml.NAMES[kind] for kind in kinds.values())),
        parameters=sum(math.prod(entry.shape) for entry in entries if entry.name != "rope_freqs.weight"),
        bytes=(export.output / FILE).stat().st_size,
        files=[FILE],
        tokenizer=vocabulary is not None,
        dropped=own.plan.dropped,
        notes=_notes(own, kinds),
        precision=_precision(own, kinds, lost),
        seconds=round(time.monotonic() - started, 2),
    )


# What type a matrix becomes


def exact_kind(form: LinearForm) -> int | None:
    """The type of ggml that has the grid of an integer form, its groups whole blocks; `None` where none does."""
    if form.rank is not None or form.bits == 16 or (form.group_size or ggml.BLOCK) % ggml.BLOCK:
        return None
    if form.bits == 8:
        return ggml.Q8_0 if form.symmetric else None
    if form.symmetric:
        return ggml.Q4_0
    # Where nothing is kept, the code must be that of zero, which is an integer zero point.
    return ggml.Q4_1 if form.sparsity is None or form.zero_point_dtype == "uint8" else None


def kind_of(matrix: Matrix, config: LLMKernelConfig, export: Export) -> int | None:
    """What was chosen for a matrix, or that of its own form: its integers', or the dtype of the checkpoint."""
    chosen = (export.embedding_type if matrix.path in ENDS else None) or export.type
    if chosen is not None:
        return ggml.TYPES[chosen]
    if matrix.form.rank is None and matrix.form.bits == 16:
        return next(kind for kind, dtype in ggml.FLOATING.items() if dtype == config.dtype)
    return exact_kind(matrix.form)


def _form_obstacles(config: LLMKernelConfig, export: Export) -> Iterator[str]:
    for matrix in matrices(config):
        if reason := unfit(matrix, kind_of(matrix, config, export)):
            yield f"{matrix.label}: {reason}"


def unfit(matrix: Matrix, kind: int | None) -> str | None:
    """What keeps a matrix from a type, in words."""
    if kind is None:
        group = f" in groups of {matrix.form.group_size}" if matrix.form.group_size else ""
        zeros = "" if matrix.form.symmetric else f" with zero points of {matrix.form.zero_point_dtype}"
        return f"is stored {describe_form(matrix.form)}{group}{zeros}, and no type of ggml has that grid"
    if kind not in ggml.FLOATING and matrix.shape[1] % ggml.BLOCK:
        return f"has {matrix.shape[1]} columns, which are no whole blocks of {ggml.BLOCK} of {ggml.NAMES[kind]}"
    return None


def _is_exact(matrix: Matrix, kind: int | None) -> bool:
    return exact_kind(matrix.form) == kind


def _inexact_scales(own: OwnCheckpoint, kinds: dict[str, int]) -> list[str]:
    """Matrices whose scales fp16 cannot hold; only other dtypes are read."""
    found = []
    for matrix in matrices(own.config):
        if not _is_exact(matrix, kinds[matrix.path]) or matrix.form.scale_dtype == "float16":
            continue
        scales = own.stored(matrix, ["scales"])["scales"]
        if not torch.equal(scales.half().float(), scales.float()):
            found.append(f"{matrix.label}: has scales of {matrix.form.scale_dtype} that ggml's float16 does not hold")
    return found


def _is_kept(own: OwnCheckpoint, matrix: Matrix, kind: int) -> bool:
    """Whether a type holds a matrix as it is stored: its codes, or its floating values."""
    if _is_packed(matrix):
        return _is_exact(matrix, kind)
    return kind == ggml.F32 or own.stored_dtype(matrix) == ggml.FLOATING.get(kind)


def _is_packed(matrix: Matrix) -> bool:
    """Whether a matrix has to be computed to be floating."""
    return matrix.form.bits < 16 or matrix.form.rank is not None


def _precision(own: OwnCheckpoint, kinds: dict[str, int], lost: Counter[str]) -> dict[str, Any] | None:
    """`Conversion.precision`, of the types that matrices were rounded to."""
    types = [kinds[matrix.path] for matrix in matrices(own.config) if not _is_kept(own, matrix, kinds[matrix.path])]
    rounded = [ggml.NAMES[kind] for kind in types if kind != ggml.F32]
    counts = {name: lost[name] for name in ("values", "underflowed", "subnormal")}
    return {"dtype": ", ".join(dict.fromkeys(rounded)), "matrices": len(rounded), **counts} if rounded else None


def _notes(own: OwnCheckpoint, kinds: dict[str, int]) -> list[str]:
    notes, config = [], own.config
    changed = [matrix for matrix in matrices(config) if not _is_kept(own, matrix, kinds[matrix.path])]
    if packed := [matrix for matrix in changed if _is_packed(matrix)]:
        kind, form = ggml.NAMES[kinds[packed[0].path]], describe_form(packed[0].form)
        notes.append(f"{len(packed)} matrices are dequantized and written anew ({packed[0].label}: {form} to {kind})")
    if floating := [matrix for matrix in changed if not _is_packed(matrix)]:
        kind = ggml.NAMES[kinds[floating[0].path]]
        notes.append(f"{len(floating)} floating matrices are rounded ({floating[0].label}: to {kind})")
    if sparse := [matrix for matrix in matrices(config) if matrix.form.sparsity is not None]:
        notes.append(f"{len(sparse)} sparse matrices are stored with their zeros ({sparse[0].label})")
    if any(_is_exact(matrix, ggml.Q4_1) and kinds[matrix.path] == ggml.Q4_1 for matrix in matrices(config)):
        notes.append("Q4_1 keeps codes and scales; it has offsets instead of zero points, rounded to float16")
    return notes


# What is written


def _entries(own: OwnCheckpoint, kinds: dict[str, int], interleaved: bool, lost: Counter[str]) -> list[Entry]:
    """What is written; `lost` counts, as that is read, what `_rounded` counts."""
    by_path = {matrix.path: matrix for matrix in matrices(own.config)}
    layers = list(own.config.per_layer_config)
    entries: dict[str, Entry] = {}
    if (factors := rope_factors(own.config)) is not None:
        entries["rope_freqs"] = Entry("rope_freqs.weight", ggml.F32, tuple(factors.shape), partial(iter, [factors]))
    for name, key in own.keys.items():
        path, _, suffix = name.rpartition(".")
        stem = _stem_of(path, by_path)
        leaf = stem.rpartition(".")[2]
        heads = None
        if interleaved and leaf in ROTATED:
            layer = layers[int(stem.split(".")[1])]
            heads = layer.num_attention_heads if leaf == "q_proj" else layer.num_key_value_heads
        if suffix == "bias" or stem not in by_path:
            read = partial(_vector, own, key, heads)
            entries[name] = Entry(gguf_name(stem, suffix), ggml.F32, own.reader.shape(key), read)
        elif stem not in entries:
            matrix, kind = by_path[stem], kinds[stem]
            by_rows = matrix.path in ENDS and matrix.form.is_dense
            rows = partial(_dense_rows, own, matrix, kind, lost) if by_rows else None
            read = rows or partial(_whole, own, matrix, kind, heads, lost)
            entries[stem] = Entry(gguf_name(stem, "weight"), kind, matrix.shape, read)
    return list(entries.values())


def _stem_of(path: str, by_path: dict[str, Matrix]) -> str:
    """The path of the matrix that a tensor belongs to; of a low-rank one's factor, that of the linear."""
    parent, _, last = path.rpartition(".")
    return parent if last in ("a", "b") and parent in by_path else path


def gguf_name(path: str, suffix: str) -> str:
    """llama.cpp's name of a tensor, of its path without the prefix of the body."""
    if path in TOPS:
        return f"{TOPS[path]}.{suffix}"
    _, index, leaf = path.split(".", 2)
    return f"blk.{index}.{LAYERS[leaf]}.{suffix}"


def _vector(own: OwnCheckpoint, key: str, heads: int | None) -> Iterator[torch.Tensor]:
    values = own.reader.tensor(key).float()
    yield interleave(values, heads) if heads else values


def _whole(
    own: OwnCheckpoint, matrix: Matrix, kind: int, heads: int | None, lost: Counter[str]
) -> Iterator[torch.Tensor]:
    """The bytes of a matrix in a type."""
    stored = own.stored(matrix)
    if _is_exact(matrix, kind):
        codes = dense_codes(stored, matrix.form, matrix.shape[1])
        blocks = ggml.of_codes(codes, matrix.form, stored["scales"], stored.get("zero_points"))
        if blocks.offsets is not None and not is_finite(blocks.offsets):
            _refuse_values(kind, matrix.label, own.weight(matrix, torch.float32))
        packed = ggml.pack_blocks(blocks, kind)
    else:
        packed = _rounded(own.weight(matrix, own.stored_dtype(matrix)), kind, matrix.label, lost)
    yield interleave(packed, heads) if heads else packed


def _dense_rows(own: OwnCheckpoint, matrix: Matrix, kind: int, lost: Counter[str]) -> Iterator[torch.Tensor]:
    """The bytes of a dense matrix in a type, some rows at a time."""
    key, columns = own.keys[f"{matrix.path}.weight"], matrix.shape[1]
    row = columns * own.reader.dtype(key).itemsize
    for block in own.reader.blocks(key, max(BLOCK_BYTES // row, 1) * row):
        yield _rounded(block.view(-1, columns), kind, matrix.label, lost)


def _rounded(weight: torch.Tensor, kind: int, label: str, lost: Counter[str]) -> torch.Tensor:
    """A floating weight `[N, I]` in a type: cast, or rounded block by block as ggml itself does.

    `lost` counts the values that are not kept as they are, and of them those whose range is not that of the type: those
    `underflowed` that became zero as float16 has no smaller number, of a value itself or of a block's scale, and those
    `subnormal` that kept fewer bits than others for that.
    """
    if weight.dtype == ggml.FLOATING.get(kind):
        return weight
    if kind in ggml.FLOATING:
        rounded, counts = cast_values(weight, ggml.FLOATING[kind])
        is_whole = not counts.pop("overflowed")
    else:
        with np.errstate(all="ignore"):  # what overflows is refused below, what underflows counted
            rounded = torch.from_numpy(gguf.quantize(weight.float().numpy(), gguf.GGMLQuantizationType(kind)))
        blocks = ggml.unpack_blocks(rounded, kind)
        is_whole = is_finite(blocks.scales) and (blocks.offsets is None or is_finite(blocks.offsets))
        counts = ggml.lost_values(weight, blocks)
    if not is_whole:
        _refuse_values(kind, label, weight)
    if kind != ggml.F32:
        lost.update({"values": weight.numel(), **counts})
    return rounded


def _refuse_values(kind: int, label: str, weight: torch.Tensor) -> NoReturn:
    largest = f"{float(weight.abs().max()):.4g}"
    raise ValueError(
        f"type={ggml.NAMES[kind]}: {label} has values beyond its range, up to {largest}; choose BF16 or F32."
    )


def _header(
    config: LLMKernelConfig, architecture: str, vocabulary: Vocabulary | None, kinds: dict[str, int]
) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(None, architecture)
    counts = [kind for path, kind in kinds.items() if path not in ENDS]
    writer.add_file_type(FILE_TYPES[max(counts, key=counts.count)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata(config, architecture).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"{architecture}.{key}", value)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        vocabulary.add_to(writer)
    return writer


def _write(path: Path, writer: gguf.GGUFWriter, entries: list[Entry], progress: bool) -> None:
    for entry in entries:
        kind = gguf.GGMLQuantizationType(entry.kind)
        writer.add_tensor_info(entry.name, entry.shape, torch.float32, entry.nbytes, kind)  # type: ignore[arg-type]
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    total = sum(entry.nbytes for entry in entries)
    with tqdm(total=total, desc="exporting", unit="B", unit_scale=True, mininterval=0.5, disable=not progress) as bar:
        writer.write_padding(file, file.tell())
        for entry in entries:
            _write_entry(file, entry, bar.update)
            writer.write_padding(file, entry.nbytes)
    sync(file)
    writer.close()


def _write_entry(file: IO[bytes], entry: Entry, advance: Callable[[int], Any]) -> None:
    written = 0
    for block in entry.read():
        flat = block.contiguous().view(-1).view(torch.uint8)
        written += file.write(flat.numpy().data)
        advance(flat.numel())
    if written != entry.nbytes:
        raise ValueError(f"{entry.name}: {written} bytes given, but its type and shape take {entry.nbytes}.")
