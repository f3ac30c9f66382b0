"""A compressed-tensors folder: a checkpoint of this family written as one, and one opened as this family's tensors.

Codes stay bit-equal both ways. Memory holds one matrix at a time.

Shapes: O out_features, I in_features, G groups of columns.
"""

import time
from functools import partial
from typing import Any

import torch
import transformers

from ..checkpoint import CheckpointReader
from ..model.configuration_llm_kernel import ATTENTION_LINEARS, MLP_LINEARS, LLMKernelConfig
from ..model.linear_llm_kernel import INT4_OFFSET, pack_nibbles
from . import compressed_tensors as ct
from .conversion import DTYPES, Conversion, count_parameters
from .derived import Derived, DerivedTensors, one
from .families import describe_form, describe_stored, nearest_family, obstacles, refuse_obstacles, to_stock
from .matrices import Matrix, matrices
from .names import HEADS, Plan, canonical, tensors_of
from .own_checkpoint import OwnCheckpoint, read_own_config
from .stock_folder import Export, write_stock

LINEARS = (*ATTENTION_LINEARS, *MLP_LINEARS)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# Out


def export_compressed(export: Export) -> Conversion:
    """Writes a stock folder with packed integers.

    Sparse matrices are stored with their zeros, and embedding and head floating: their readers have no other form.
    """
    started = time.monotonic()
    config = read_own_config(export.folder)
    family = nearest_family(config, ct.unfit)
    remedy = "export a checkpoint without it, or the dense one that it was made from"
    refuse_obstacles(list(obstacles(config, family, ct.unfit)), export.to, remedy)
    integers = [matrix for matrix in matrices(config) if ct.stays_integer(matrix)]
    if not integers:
        raise ValueError(f"to={export.to}: no linear is stored as integers; export to {family.model_type!r} instead.")
    own = OwnCheckpoint(export.folder, config)
    stock = to_stock(config, family)
    stock.dtype = dtype = export.dtype or common_dtype(config, integers)
    own.check_products(dtype)
    model_class = getattr(transformers, family.prefix + HEADS[own.head].suffix)
    stock.architectures = [model_class.__name__]
    made, tied = tensors_of(model_class, stock)
    names = {canonical(name).removesuffix(".weight"): name.removesuffix(".weight") for name in made}
    schemes = {names[matrix.path]: ct.Scheme.of_form(matrix.form, matrix.shape[1]) for matrix in integers}
    entries = _entries(own, made, names)
    stock.quantization_config = ct.quantization_config(schemes, _floating_linears(made, tied, schemes))
    plan = Plan({name: name for name in entries}, own.plan.dropped)
    parameters = count_parameters(own.reader, own.plan, config)
    return write_stock(export, stock, DerivedTensors(entries), plan, dtype, parameters, started, _notes(config, dtype))


def common_dtype(config: LLMKernelConfig, integers: list[Matrix]) -> torch.dtype:
    """The format has one floating dtype: fp32 where the model is in it, else that of the scales, if they have one."""
    scales = {DTYPES[matrix.form.scale_dtype] for matrix in integers}
    if config.dtype == torch.float32 or len(scales) > 1:
        return torch.float32
    return scales.pop()


def _entries(own: OwnCheckpoint, made: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, Derived]:
    """What is written, in the order of the stock class's own tensors."""
    by_name = {f"{names[matrix.path]}.weight": matrix for matrix in matrices(own.config)}
    entries: dict[str, Derived] = {}
    for name in made:
        matrix = by_name.get(name)
        if matrix is None or matrix.form.is_dense:
            entries[name] = own.entry(canonical(name))
        elif ct.stays_integer(matrix):
            entries |= _packed_entries(own, matrix, name.removesuffix("weight"))
        else:
            read = partial(own.row_blocks, matrix)
            entries[name] = Derived(matrix.shape, torch.float32, own.file(matrix), read)
    return entries


def _packed_entries(own: OwnCheckpoint, matrix: Matrix, prefix: str) -> dict[str, Derived]:
    form, shape, file = matrix.form, matrix.shape, own.file(matrix)
    reads = {
        ct.PACKED: lambda: ct.pack_codes(own.stored(matrix), form, shape[1]),
        ct.SCALE: lambda: own.stored(matrix, ["scales"])["scales"],
        ct.ZERO_POINT: lambda: ct.pack_zero_points(own.stored(matrix, ["zero_points"])["zero_points"], form.bits),
        ct.SHAPE: lambda: torch.tensor(shape),
    }
    return {
        f"{prefix}{name}": Derived(size, kind or DTYPES[form.scale_dtype], file, partial(one, reads[name]))
        for name, (size, kind) in ct.Scheme.of_form(form, shape[1]).tensors(shape).items()
    }


def _floating_linears(made: dict[str, torch.Tensor], tied: dict[str, str], schemes: dict[str, ct.Scheme]) -> list[str]:
    """Names of the linears of a stock model that are not quantized, a tied head included."""
    weights = [name for name, tensor in made.items() if name.endswith(".weight") and tensor.dim() == 2]
    linears = [name.removesuffix(".weight") for name in (*weights, *tied) if "embed_tokens" not in name]
    return [name for name in linears if name not in schemes]


def _notes(config: LLMKernelConfig, dtype: torch.dtype) -> list[str]:
    """What the export has of another kind than the checkpoint, and who cannot read it."""
    notes = []
    if dtype != config.dtype:
        notes.append(f"written in {str(dtype)[6:]}, for the format has one dtype for scales and all that is floating")
    if sparse := [matrix for matrix in matrices(config) if matrix.form.sparsity is not None]:
        kind = f"{sparse[0].label}: {describe_form(sparse[0].form)}"
        notes.append(f"{len(sparse)} sparse matrices are stored with their zeros ({kind})")
    ends = [matrix.label for matrix in matrices(config) if matrix.form.bits < 16 and not ct.stays_integer(matrix)]
    if any(ct.stays_integer(matrix) and not matrix.form.symmetric for matrix in matrices(config)):
        notes.append("transformers loads zero points with CompressedTensorsConfig(dequantize=True) only, up to 5.23")
    notes += [f"{label} is stored floating, as the format's readers have it" for label in ends]
    return notes + _differing_schemes(config)


def _differing_schemes(config: LLMKernelConfig) -> list[str]:
    """Who does not read the folder where linears on the same inputs, which vLLM fuses, have several schemes."""
    found = [
        (index, {name: layer.linear_form(name) for name in names})
        for index, layer in enumerate(config.per_layer_config)
        for names in FUSED
        if len({_scheme_of(layer, name) for name in names}) > 1
    ]
    if not found:
        return []
    index, forms = found[0]
    own = ", ".join(f"{name} {describe_stored(form)}" for name, form in forms.items())
    others = f"; {len(found) - 1} more like it" if len(found) > 1 else ""
    return [f"vLLM will not load this, transformers does: it fuses linears that differ (layer {index}: {own}{others})"]


def _scheme_of(layer: Any, name: str) -> ct.Scheme | None:
    form = layer.linear_form(name)
    return None if form.bits == 16 else ct.Scheme.of_form(form, layer.linear_shapes()[name][1])


# In


def open_compressed(
    reader: CheckpointReader, config: ct.QuantizationConfig, keep: bool
) -> tuple[DerivedTensors, list[Matrix]]:
    """A compressed-tensors folder as this family's tensors.

    Args:
        reader: of the folder.
        config: its `quantization_config`.
        keep: the codes, or floating weights in the dtype of the scales, as the format's own reader makes them.

    Returns:
        The tensors, and the matrices whose codes are kept.

    Raises:
        ValueError: tensors that are missing or contradict `quantization_config`; kept ones with columns out of order.
    """
    keys = reader.keys()
    stems = [key.removesuffix(f".{ct.PACKED}") for key in keys if key.endswith(f".{ct.PACKED}")]
    opened = {stem: _open_matrix(reader, config, stem, keep) for stem in stems}
    names = (ct.PACKED, ct.SCALE, ct.ZERO_POINT, ct.SHAPE, ct.GROUP_INDEX)
    entries: dict[str, Derived] = {}
    for key in keys:
        stem, _, name = key.rpartition(".")
        if stem in opened and name in names:
            entries |= opened[stem][0] if name == ct.PACKED else {}
            continue
        if name == "weight" and stem.rpartition(".")[2] in LINEARS and config.scheme(stem) is not None:
            raise ValueError(
                f"{key}: is floating in {reader.file(key)}, but {config.where} packs it; use the config.json and the "
                "weights of one checkpoint."
            )
        entries[key] = Derived(reader.shape(key), reader.dtype(key), reader.file(key), partial(reader.blocks, key))
    return DerivedTensors(entries), [matrix for _, matrix in opened.values()] if keep else []


def _open_matrix(
    reader: CheckpointReader, config: ct.QuantizationConfig, stem: str, keep: bool
) -> tuple[dict[str, Derived], Matrix]:
    """The entries of one packed matrix under this family's names, and what it is."""
    scheme = config.scheme(stem, "Embedding" if stem.endswith("embed_tokens") else "Linear")
    if scheme is None:
        raise ValueError(
            f"{stem}.{ct.PACKED}: is packed in {reader.file(f'{stem}.{ct.PACKED}')}, but {config.where} leaves it "
            "floating; use the config.json and the weights of one checkpoint."
        )
    shape = _check_matrix(reader, config, stem, scheme)
    if keep:
        _check_column_order(reader, stem, scheme, shape[1])
    dtype = reader.dtype(f"{stem}.{ct.SCALE}")
    try:
        form = ct.form_of(scheme, dtype)
    except ValueError as error:
        raise ValueError(f"{stem}.{ct.SCALE}: {error}") from None
    file = reader.file(f"{stem}.{ct.PACKED}")
    matrix = Matrix(canonical(f"{stem}.weight").removesuffix(".weight"), stem, form, shape)
    if not keep:
        read = partial(_floating, reader, stem, scheme, shape)
        return {f"{stem}.weight": Derived(shape, dtype, file, partial(one, read))}, matrix
    reads = {
        "values": lambda: _codes(reader, stem, scheme, shape),
        "scales": lambda: reader.tensor(f"{stem}.{ct.SCALE}"),
        "zero_points": lambda: ct.unpack_zero_points(reader.tensor(f"{stem}.{ct.ZERO_POINT}"), scheme, shape[0]),
    }
    return {
        f"{stem}.{name}": Derived(size, getattr(torch, str(kind)), file, partial(one, reads[name]))
        for name, (size, kind) in form.stored_tensors(*shape).items()
    }, matrix


def _check_matrix(
    reader: CheckpointReader, config: ct.QuantizationConfig, stem: str, scheme: ct.Scheme
) -> tuple[int, int]:
    """The shape (O, I) of a packed matrix whose tensors are all there and of the shapes that follow from it."""
    key = f"{stem}.{ct.SHAPE}"
    if key not in reader:
        raise ValueError(f"{key}: missing in {reader.folder}, though {ct.PACKED} is there; fetch all of its shards.")
    shape = tuple(int(size) for size in reader.tensor(key).flatten())
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{key}: is {list(shape)} in {reader.file(key)}, no rows and columns; fetch this file again.")
    for name, (size, dtype) in scheme.tensors(shape).items():
        key = f"{stem}.{name}"
        if key not in reader:
            raise ValueError(
                f"{key}: missing in {reader.folder}, but {config.where} makes it (symmetric={scheme.symmetric}); fetch "
                "all of its shards."
            )
        if reader.shape(key) != size or (dtype is not None and name != ct.SHAPE and reader.dtype(key) != dtype):
            raise ValueError(
                f"{key}: is {str(reader.dtype(key))[6:]} {list(reader.shape(key))} in {reader.file(key)}, but "
                f"{config.where} makes it {'floating' if dtype is None else str(dtype)[6:]} {list(size)}; use the "
                "config.json and the weights of one checkpoint."
            )
    return shape


def _group_index(reader: CheckpointReader, stem: str, scheme: ct.Scheme, in_features: int) -> torch.Tensor:
    """The group of every column `[I]`: in order, or what activation order has made of it."""
    key, ordered = f"{stem}.{ct.GROUP_INDEX}", torch.arange(in_features) // (scheme.group_size or in_features)
    if key not in reader:
        return ordered
    index = reader.tensor(key).flatten().long()
    if index.shape != ordered.shape or index.min() < 0 or index.max() > ordered[-1]:
        raise ValueError(f"{key}: is no group of every column in {reader.file(key)}; fetch this file again.")
    return index


def _check_column_order(reader: CheckpointReader, stem: str, scheme: ct.Scheme, in_features: int) -> None:
    """Raises `ValueError` where groups are not of consecutive columns."""
    if not bool((_group_index(reader, stem, scheme, in_features).diff() >= 0).all()):
        raise ValueError(
            f"{stem}.{ct.GROUP_INDEX}: puts columns into groups out of their order (actorder='group'), which no form "
            "here can; pass dequantize (--dequantize), or quantize it again with actorder='weight'."
        )


def _codes(reader: CheckpointReader, stem: str, scheme: ct.Scheme, shape: tuple[int, int]) -> torch.Tensor:
    codes = ct.unpack_codes(reader.tensor(f"{stem}.{ct.PACKED}"), scheme, shape[1])
    return pack_nibbles(codes) if scheme.bits == 4 else codes


def _floating(reader: CheckpointReader, stem: str, scheme: ct.Scheme, shape: tuple[int, int]) -> torch.Tensor:
    """The weight `[O, I]` in the dtype of its scales, `(code - zero_point) * scale` by the group of every column."""
    values = ct.unpack_codes(reader.tensor(f"{stem}.{ct.PACKED}"), scheme, shape[1]).float()
    groups = _group_index(reader, stem, scheme, shape[1])
    if not scheme.symmetric:
        values -= ct.unpack_zero_points(reader.tensor(f"{stem}.{ct.ZERO_POINT}"), scheme, shape[0])[:, groups]
    elif scheme.bits == 4:
        values -= INT4_OFFSET
    scales = reader.tensor(f"{stem}.{ct.SCALE}")
    return (values * scales.float()[:, groups]).to(scales.dtype)
