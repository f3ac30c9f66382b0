"""The inventory of a checkpoint: what is stored for each module, checked against its configuration.

It is taken from `config.json` and the headers of the weight files: no model is built and no weight is read, unless
`verify` asks for it.

Reading order: what there is -> which module owns it -> an entry a module -> verification.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..checkpoint import CheckpointReader, check_finite
from ..model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ..model.linear_llm_kernel import check_mask
from .layout import FAMILY, Slot, norm_shapes, positions, shape_config, slots, stored_values
from .source import model_folder, read_config

ORDER = {
    part: rank
    for rank, part in enumerate(
        ("embed_tokens", "layers", "norm", "lm_head", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
        + ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
}

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Entry:
    """What one module stores.

    Args:
        name: path of the module.
        shape: of its weight, as a dense one would have it.
        form: in words, see `Slot.form_name`.
        parameters: values stored: of a sparse weight the kept ones, of a low rank both factors', with biases.
        dense_parameters: values of the weight as a dense one, with biases.
        bytes: of all its tensors, masks, scales and zero points included.
        sparsity: share of positions that are not stored.
        rank: of a low-rank weight.
    """

    name: str
    shape: tuple[int, ...]
    form: str
    parameters: int
    dense_parameters: int
    bytes: int
    sparsity: float
    rank: int | None


@dataclass(frozen=True)
class Inventory:
    """The entries of a model and their totals; `bytes_on_disk` is of the weight files, `None` for a model in memory.

    `parameters` counts the values that are stored, `dense_parameters` those of the same architecture with every linear
    dense. `compressed` counts the modules whose form is not dense.
    """

    model_type: str
    entries: tuple[Entry, ...]
    parameters: int
    dense_parameters: int
    bytes: int
    bytes_on_disk: int | None
    compressed: int
    verified: bool

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def inspect(model: Any, verify: bool = False, progress: bool = True) -> Inventory:
    """Takes the inventory of a checkpoint folder, a repository on the Hub, or a model in memory.

    Args:
        model: one of these.
        verify: reads all weights too: floating ones must be finite, a mask must keep what its form says.
        progress: whether `verify` draws a bar on stderr.

    Raises:
        ValueError: a damaged file, or a configuration that its tensors contradict; the key and the remedy are named.
    """
    if isinstance(model, nn.Module):
        return _inspect_memory(model, verify, progress)
    folder = model_folder(model)
    config = read_config(folder)
    reader = CheckpointReader(folder)
    keys = reader.keys()
    try:
        inventory = take_inventory(config, {key: (reader.shape(key), reader.dtype(key)) for key in keys})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if verify:
        _verify(config, keys, lambda key: [reader.tensor(key)] if _is_mask(key) else reader.blocks(key), progress)
    size = sum(path.stat().st_size for path in {reader.file(key) for key in keys})
    return replace(inventory, bytes_on_disk=size, verified=verify)


def _inspect_memory(model: Any, verify: bool, progress: bool) -> Inventory:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    inventory = take_inventory(config, {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in state.items()})
    if verify:
        _verify(config, list(state), lambda key: [state[key]], progress)
    return replace(inventory, verified=verify)


def take_inventory(config: dict[str, Any], tensors: Tensors) -> Inventory:
    """The inventory of named tensors under a configuration (the contents of `config.json`); `inspect` without files.

    Raises:
        ValueError: a tensor that the configuration makes is missing or of another shape or dtype; or one is there that
            belongs to a layer or a compressed linear and that the configuration does not make.
    """
    shapes, expected = _layout(config, tensors)
    if shapes is not None:
        _check_norms(norm_shapes(shapes, _prefix(tensors)), tensors)
        _check_layers(tensors, shapes.num_hidden_layers)
    owned = _owners(tensors, expected)
    entries = []
    for name in sorted(owned.keys() | expected.keys(), key=_in_order):
        stored = {key[len(name) + 1 :]: tensors[key] for key in owned.get(name, ())}
        slot = expected.get(name)
        if slot is not None:
            _check_slot(slot, stored, strict=config.get("model_type") == FAMILY)
        entries.append(_dense_entry(name, stored) if slot is None else _slot_entry(slot, stored))
    return Inventory(
        model_type=str(config.get("model_type")),
        entries=tuple(entries),
        parameters=sum(entry.parameters for entry in entries),
        dense_parameters=sum(entry.dense_parameters for entry in entries),
        bytes=sum(entry.bytes for entry in entries),
        bytes_on_disk=None,
        compressed=sum(slot.is_compressed for slot in expected.values()),
        verified=False,
    )


def _layout(config: dict[str, Any], keys: Iterable[str]) -> tuple[LLMKernelConfig | None, dict[str, Slot]]:
    """What the configuration makes; nothing is known of families that are not Llama-shaped."""
    shapes = shape_config(config)
    if shapes is None:
        return None, {}
    has_head = any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
    return shapes, {slot.name: slot for slot in slots(shapes, _prefix(keys), has_head)}


def _prefix(tensors: Iterable[str]) -> str:
    return "model." if any(key.startswith("model.") for key in tensors) else ""


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """Sorts modules as they compute, layers by number, unknown names last and by name."""
    parts = name.removeprefix("model.").split(".")
    return [(ORDER.get(part, len(ORDER)), int(part) if part.isdigit() else 0, part) for part in parts]


def _owners(tensors: Tensors, expected: dict[str, Slot]) -> dict[str, list[str]]:
    """Keys of the tensors by the module that owns them: the linear they are a part of, else their parent."""
    owned: dict[str, list[str]] = {}
    for key in tensors:
        owner = parent = key.rpartition(".")[0]
        while owner and owner not in expected:
            owner = owner.rpartition(".")[0]
        owned.setdefault(owner or parent, []).append(key)
    return owned


def _check_norms(shapes: dict[str, tuple[int, ...]], tensors: Tensors) -> None:
    for key, shape in shapes.items():
        _check_tensor(key, tensors.get(key), shape, None)


def _check_layers(tensors: Tensors, layers: int) -> None:
    for key in tensors:
        parts = key.removeprefix("model.").split(".")
        if parts[0] == "layers" and parts[1].isdigit() and int(parts[1]) >= layers:
            raise ValueError(f"{key}: config.json has num_hidden_layers={layers}; correct it or use its own weights.")


def _check_slot(slot: Slot, stored: Tensors, strict: bool) -> None:
    wanted = slot.stored_tensors()
    for name, (shape, dtype) in wanted.items():
        _check_tensor(f"{slot.name}.{name}", stored.get(name), shape, dtype)
    # Stock families add a bias of their own; in this one the form says all.
    extra = sorted(stored.keys() - wanted.keys() - (set() if strict else {"bias"}))
    if extra:
        raise ValueError(
            f"{slot.name}.{extra[0]}: is stored, but config.json makes this linear "
            f"{slot.form_name('floating')} of {sorted(wanted)}; use the config.json of these weights."
        )


def _check_tensor(key: str, stored: Any, shape: tuple[int, ...] | None, dtype: str | None) -> None:
    if stored is None:
        wanted = "" if shape is None else f" {list(shape)}"
        raise ValueError(f"{key}: missing in the weights; config.json makes it{wanted}: use its own weights.")
    if shape is not None and stored[0] != shape:
        raise ValueError(
            f"{key}: is {list(stored[0])} in the weights and {list(shape)} by config.json; use the config.json of "
            "these weights."
        )
    if dtype is not None and stored[1] != getattr(torch, dtype):
        raise ValueError(f"{key}: is {_dtype_name(stored[1])}, its form stores {dtype}; write the checkpoint again.")


def _slot_entry(slot: Slot, stored: Tensors) -> Entry:
    form, out_features, in_features = slot.form, slot.out_features, slot.in_features
    bias = sum(math.prod(shape) for name, (shape, _) in stored.items() if name.rpartition(".")[2] == "bias")
    values = stored_values(form, out_features, in_features)
    return Entry(
        name=slot.name,
        shape=(out_features, in_features),
        form=slot.form_name(_floating_dtype(stored)),
        parameters=values + bias,
        dense_parameters=out_features * in_features + bias,
        bytes=_bytes(stored),
        sparsity=1 - values / positions(form, out_features, in_features),
        rank=form.rank,
    )


def _dense_entry(name: str, stored: Tensors) -> Entry:
    shape, dtype = stored.get("weight") or next(iter(stored.values()))
    count = sum(math.prod(shape) for shape, _ in stored.values())
    form = f"dense {_dtype_name(dtype)}"
    return Entry(name, shape, form, count, count, _bytes(stored), sparsity=0.0, rank=None)


def _floating_dtype(stored: Tensors) -> str:
    """The dtype of the values that follow the model's own; of integer forms the name does not show it."""
    names = ("weight", "values", "bias")
    floating = [dtype for key, (_, dtype) in stored.items() if key.rpartition(".")[2] in names]
    return _dtype_name(next((dtype for dtype in floating if dtype.is_floating_point), torch.float32))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(stored: Tensors) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored.values())


def _is_mask(key: str) -> bool:
    return key.endswith(".mask")


def _verify(
    config: dict[str, Any], keys: list[str], read: Callable[[str], Iterable[torch.Tensor]], progress: bool
) -> None:
    """Reads every weight: floating ones must be finite, a mask must keep what its form says."""
    masks = {key: part for slot in _layout(config, keys)[1].values() for key, part in _masks(slot)}
    for key in tqdm(keys, desc="verify", unit="tensor", disable=not progress):
        for block in read(key):
            check_finite(key, block, Path("the checkpoint"))
            if key in masks:
                _check_mask(key, block, *masks[key])


def _masks(slot: Slot) -> Iterable[tuple[str, tuple[LinearForm, int]]]:
    """Names of the masks of a linear, each with the form and the columns of its factor."""
    parts = [("", slot.form, slot.in_features)]
    if slot.form.rank is not None:
        a, b = slot.form.factors
        parts = [("a.", a, slot.in_features), ("b.", b, slot.form.rank)]
    return [(f"{slot.name}.{part}mask", (form, columns)) for part, form, columns in parts if form.sparsity is not None]


def _check_mask(key: str, mask: torch.Tensor, form: LinearForm, columns: int) -> None:
    try:
        check_mask(mask, form, columns)
    except ValueError as error:
        raise ValueError(f"{key}: {str(error).removeprefix('mask: ')}") from None
