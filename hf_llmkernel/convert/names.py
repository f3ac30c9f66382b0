"""Which tensors a class has, and which tensor of a source each of them is.

Names are matched by what follows the prefix of the body (`model.`, `transformer.`, or none in a base model's file):
Llama's names are ours, and nothing else is renamed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel

BODY = re.compile(r"(?:model\.|transformer\.)?((?:embed_tokens|layers|norm)\..+)")
# Recomputed from the configuration wherever a file holds them.
RECOMPUTED = re.compile(r"(?:^|.*\.)rotary_emb\.inv_freq|rope_freqs\.weight")


@dataclass(frozen=True)
class Head:
    """A head on the stack: the end of its class names, and how its own tensors' names begin."""

    suffix: str
    tensors: str | None = None


HEADS = {
    "base": Head("Model"),
    "causal-lm": Head("ForCausalLM", "lm_head."),
    "sequence-classification": Head("ForSequenceClassification", "score."),
    "token-classification": Head("ForTokenClassification", "score."),
    "question-answering": Head("ForQuestionAnswering", "qa_outputs."),
}


class Tensors(Protocol):
    """What a conversion reads from: `CheckpointReader`, or a GGUF file."""

    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def file(self, key: str) -> Path: ...

    def blocks(self, key: str) -> Iterator[torch.Tensor]: ...


@dataclass(frozen=True)
class Plan:
    """`copies`: `{name to write: source key}`; `dropped`: source keys that are not written."""

    copies: dict[str, str]
    dropped: list[str]


def head_of(architectures: list[str] | None, prefix: str, keys: list[str], where: str) -> str:
    """The head of a source by its config's `architectures`, or by its tensors where that is silent.

    Raises:
        ValueError: a class that has no counterpart.
    """
    if not architectures:
        return _head_of_tensors(keys)
    for name, head in HEADS.items():
        if architectures[0] == prefix + head.suffix:
            return name
    known = [prefix + head.suffix for head in HEADS.values()]
    raise ValueError(f"{where}: architectures={architectures} has no counterpart here; the known classes are {known}.")


def _head_of_tensors(keys: list[str]) -> str:
    if "score.weight" in keys:
        return "token-classification" if "score.bias" in keys else "sequence-classification"
    if "qa_outputs.weight" in keys:
        return "question-answering"
    return "base" if "embed_tokens.weight" in keys else "causal-lm"


def check_head(head: str | None) -> None:
    """Raises `ValueError` for a head that is not one of `HEADS`."""
    if head is not None and head not in HEADS:
        raise ValueError(f"head={head!r}: is not one of {list(HEADS)}; choose one, or leave it to the source.")


def canonical(name: str) -> str:
    """A tensor's name without the prefix of the body."""
    match = BODY.fullmatch(name)
    return match[1] if match else name


def tensors_of(model_class: type[PreTrainedModel], config) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors that a class stores, on the meta device, and its tied ones `{left out: stored}`."""
    with torch.device("meta"):
        model = model_class(config)
    tied = dict(model.all_tied_weights_keys)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}, tied


def plan_copies(
    tensors: Tensors, made: dict[str, torch.Tensor], tied: dict[str, str], other_heads: bool, where: str
) -> Plan:
    """Finds every tensor of a class in a source.

    Args:
        tensors: the source.
        made, tied: as `tensors_of` gives them.
        other_heads: whether tensors of another head are left behind, because the caller chose this one.
        where: of the source's configuration, for messages.

    Raises:
        ValueError: naming a tensor that is unexpected, doubled, missing, of another shape, or of another kind of dtype.
    """
    targets = {canonical(name): name for name in made}
    tied_names = {canonical(name): canonical(source) for name, source in tied.items()}
    heads = tuple(head.tensors for head in HEADS.values() if head.tensors)
    copies: dict[str, str] = {}
    dropped: list[str] = []
    tied_keys: dict[str, str] = {}
    for key, name in zip(keys := tensors.keys(), map(canonical, keys), strict=True):
        if name in targets:
            if targets[name] in copies:
                raise ValueError(f"{key}: also there as {copies[targets[name]]} in {tensors.file(key)}; remove one.")
            copies[targets[name]] = key
        elif name in tied_names:
            tied_keys[targets[tied_names[name]]] = key
        elif RECOMPUTED.fullmatch(key) or (other_heads and key.startswith(heads)):
            dropped.append(key)
        else:
            raise ValueError(
                f"{key}: unexpected in {tensors.file(key)}, {where} makes no such tensor; use the config.json and the "
                "weights of one checkpoint."
            )
    for name, key in tied_keys.items():
        dropped += [key] if copies.setdefault(name, key) != key else []
    _check_copies(tensors, made, copies, where)
    return Plan({name: copies[name] for name in made}, dropped)


def _check_copies(tensors: Tensors, made: dict[str, torch.Tensor], copies: dict[str, str], where: str) -> None:
    if missing := [name for name in made if name not in copies]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}{others}: missing in the source, but {where} makes it; fetch all of its shards.")
    for name, key in copies.items():
        shape, dtype = tensors.shape(key), tensors.dtype(key)
        if shape != tuple(made[name].shape):
            raise ValueError(
                f"{key}: shape {list(shape)} in {tensors.file(key)}, but {where} makes it {list(made[name].shape)}; "
                "use the config.json and the weights of one checkpoint."
            )
        if not made[name].is_floating_point():
            if dtype != made[name].dtype:
                raise ValueError(
                    f"{key}: is {_plain(dtype)} in {tensors.file(key)}, but {where} makes it "
                    f"{_plain(made[name].dtype)}; use the config.json and the weights of one checkpoint."
                )
        elif not dtype.is_floating_point or dtype.itemsize == 1:
            raise ValueError(
                f"{key}: is {_plain(dtype)} in {tensors.file(key)}, so the source is quantized; dequantize it first, "
                "or convert the checkpoint that it was made from."
            )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def whole_tensor(tensors: Tensors, path: str, suffix: str) -> torch.Tensor:
    """The tensor `path.suffix` of a source."""
    key = f"{path}.{suffix}"
    return torch.cat([block.flatten() for block in tensors.blocks(key)]).view(tensors.shape(key))


def equal_tensors(tensors: Tensors, first: str, second: str) -> bool:
    """Whether two tensors of a source hold the same values, piece by piece."""
    if tensors.shape(first) != tensors.shape(second):
        return False
    pairs = zip(tensors.blocks(first), tensors.blocks(second), strict=False)
    if tensors.dtype(first) != tensors.dtype(second):
        return False
    return all(torch.equal(a, b) for a, b in pairs)
