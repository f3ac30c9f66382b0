"""The `pack-quantized` format of compressed-tensors, that transformers' stock classes and vLLM read: out and in.

Integers of 4 or 8 bits lie as unsigned numbers in the bits of int32 words, the first in the lowest: those of a row side
by side in `weight_packed`, zero points of a group column by column in `weight_zero_point`. Signed ones are stored with
an offset of half the range. Layout: https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized.

Reading order: words -> one matrix out -> one matrix in -> `quantization_config` out -> `quantization_config` in.

Shapes: O out_features, I in_features, G groups of columns, P columns packed into words: ceil(I * bits / 32).
"""

import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.nn import functional as F

from ..model.configuration_llm_kernel import SCALE_DTYPES, LinearForm
from ..model.linear_llm_kernel import pack_nibbles, unpack_nibbles
from .matrices import Matrix
from .own_checkpoint import dense_codes

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
PACKED, SCALE, ZERO_POINT, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
GROUP_INDEX = "weight_g_idx"
SIGN = 128  # between int8 and its stored number
# Fields of a scheme's `weights` that say how it was made, not what is stored.
HISTORY = {"observer", "observer_kwargs", "block_structure", "scale_dtype", "zp_dtype"}


def pack_words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 `[N, ceil(K * bits / 32)]` of unsigned numbers, uint8 `[N, K]`."""
    padded = F.pad(numbers, (0, -numbers.shape[1] % (32 // bits)))
    packed = pack_nibbles(padded) if bits == 4 else padded
    return packed.flatten().view(torch.int32).view(len(numbers), -1)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_words`: uint8 `[N, count]`."""
    numbers = words.flatten().view(torch.uint8).view(len(words), -1)
    return unpack_nibbles(numbers, count) if bits == 4 else numbers[:, :count]


@dataclass(frozen=True)
class Scheme:
    """How matrices are quantized: bits, columns that share a scale (`None`: all of a row), and whether around zero."""

    bits: int
    group_size: int | None
    symmetric: bool

    @classmethod
    def of_form(cls, form: LinearForm, in_features: int) -> "Scheme":
        """The scheme of an integer form; a group as wide as the row is no group."""
        group = form.group_size
        return cls(form.bits, None if group is None or group >= in_features else group, form.symmetric)

    def tensors(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Names, shapes and dtypes of what a matrix stores; dtype `None` is that of scales."""
        rows, columns = shape
        groups = 1 if self.group_size is None else math.ceil(columns / self.group_size)
        stored: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
            PACKED: ((rows, math.ceil(columns * self.bits / 32)), torch.int32),
            SCALE: ((rows, groups), None),
            SHAPE: ((2,), torch.int64),
        }
        if not self.symmetric:
            stored[ZERO_POINT] = ((math.ceil(rows * self.bits / 32), groups), torch.int32)
        return stored

    def to_dict(self) -> dict[str, Any]:
        """The `weights` of a group in `quantization_config`."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
        }


def pack_codes(stored: dict[str, torch.Tensor], form: LinearForm, in_features: int) -> torch.Tensor:
    """Words `[O, P]` of the codes of an integer matrix as `OwnCheckpoint.stored` gives it, bit-equal."""
    codes = dense_codes(stored, form, in_features)
    return pack_words(codes.view(torch.uint8) ^ SIGN if codes.dtype == torch.int8 else codes, form.bits)


def pack_zero_points(zero_points: torch.Tensor, bits: int) -> torch.Tensor:
    """Words `[ceil(O * bits / 32), G]` of zero points, uint8 `[O, G]`."""
    return pack_words(zero_points.t(), bits).t().contiguous()


def unpack_codes(words: torch.Tensor, scheme: Scheme, in_features: int) -> torch.Tensor:
    """Codes `[N, I]` of words `[N, P]` as this family's forms have them: int8 where 8-bit symmetric, else uint8."""
    numbers = unpack_words(words, scheme.bits, in_features)
    return (numbers ^ SIGN).view(torch.int8) if scheme.bits == 8 and scheme.symmetric else numbers


def unpack_zero_points(words: torch.Tensor, scheme: Scheme, out_features: int) -> torch.Tensor:
    """Zero points, uint8 `[O, G]`, of words `[ceil(O * bits / 32), G]`."""
    return unpack_words(words.t(), scheme.bits, out_features).t().contiguous()


def unfit(matrix: Matrix) -> str | None:
    """What keeps a matrix from being exported; sparse ones are, with their zeros stored."""
    form, columns = matrix.form, matrix.shape[1]
    if form.rank is not None:
        return f"is stored low-rank (rank {form.rank}), and {METHOD} has one matrix a linear"
    if not stays_integer(matrix):
        return None
    if form.group_size is not None and form.group_size < columns and columns % form.group_size:
        return f"is stored in groups of {form.group_size}, of which {columns} columns are no whole number"
    if not form.symmetric and form.zero_point_dtype != "uint8":
        return f"has zero points of {form.zero_point_dtype}, and {METHOD} has integer ones"
    return None


def stays_integer(matrix: Matrix) -> bool:
    """Whether a matrix is exported as integers: the format's readers have floating embeddings and heads only."""
    return matrix.form.rank is None and matrix.form.bits < 16 and matrix.path not in ("embed_tokens", "lm_head")


def quantization_config(schemes: dict[str, Scheme], floating: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model.

    Args:
        schemes: `{name of a linear: its scheme}`.
        floating: names of the linears that are not quantized.
    """
    distinct = list(dict.fromkeys(schemes.values()))
    groups = {}
    for number, scheme in enumerate(distinct):
        members = [name for name, own in schemes.items() if own == scheme]
        targets = ["Linear"] if len(distinct) == 1 else members
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": scheme.to_dict(),
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": floating,
        "kv_cache_scheme": None,
    }


class QuantizationConfig:
    """A `quantization_config` read: the scheme of every module by name.

    Args:
        fields: its own, `quant_method` being this one.
        where: config.json, for messages.

    Raises:
        ValueError: another format, or what this family's forms cannot express.
    """

    def __init__(self, fields: dict[str, Any], where: str):
        self.where = where
        for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            given = fields.get(name) or {}
            if given and not (name == "sparsity_config" and given.get("format") == "dense"):
                self._refuse(f"has a {name}, which is not supported; use a checkpoint of integer weights alone")
        groups = fields.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
            self._refuse("has no config_groups; fetch this file again")
        self.ignore = self._names(fields.get("ignore") or [], "ignore")
        self.groups = [self._group(name, group, fields.get("format")) for name, group in groups.items()]

    def scheme(self, module: str, kind: str = "Linear") -> Scheme | None:
        """The scheme of a module by its name and class, `None` where it stays floating."""
        if _matches(module, kind, self.ignore):
            return None
        return next((scheme for targets, scheme in self.groups if _matches(module, kind, targets)), None)

    def _group(self, name: str, group: dict[str, Any], default: Any) -> tuple[list[str], Scheme]:
        form = group.get("format") or default
        if form != FORMAT:
            self._refuse(f"{name} has format {form!r}; the one that is read is {FORMAT!r}")
        for side in ("input_activations", "output_activations"):
            if group.get(side) is not None:
                self._refuse(f"{name} quantizes {side}, which is not supported; use a checkpoint of integer weights")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            self._refuse(f"{name} has no weights; fetch this file again")
        return self._names(group.get("targets"), f"{name}.targets"), self._scheme(name, weights)

    def _scheme(self, name: str, weights: dict[str, Any]) -> Scheme:
        strategy, group = weights.get("strategy"), weights.get("group_size")
        group = None if group in (None, -1) else group
        strategy = strategy or ("channel" if group is None else "group")
        legal = {
            "num_bits": (weights.get("num_bits"), (4, 8)),
            "type": (weights.get("type", "int"), ("int",)),
            "strategy": (strategy, ("group", "channel")),
            "symmetric": (weights.get("symmetric", True), (True, False)),
            "dynamic": (weights.get("dynamic", False), (False,)),
            "actorder": (weights.get("actorder"), (None, False, "weight", "static", "group", "dynamic")),
        }
        for field, (value, known) in legal.items():
            if value not in known:
                self._refuse(f"{name} has {field}={value!r}; what is read is {list(known)}")
        if (strategy == "group") != (isinstance(group, int) and not isinstance(group, bool) and group > 0):
            self._refuse(f"{name} has strategy={strategy!r} with group_size={weights.get('group_size')!r}; correct it")
        if unknown := sorted(set(weights) - {*legal, "group_size", *HISTORY}):
            self._refuse(f"{name} has {unknown[0]}={weights[unknown[0]]!r}, which is not known")
        return Scheme(weights["num_bits"], group, weights.get("symmetric", True))

    def _names(self, names: Any, what: str) -> list[str]:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._refuse(f"has {what}={names!r}, which is no list of names; fetch this file again")
        for name in (name for name in names if name.startswith("re:")):
            try:
                re.compile(name[3:])
            except re.error:
                self._refuse(f"has {name!r} in {what}, which is no expression; correct it")
        return names

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self.where}: quantization_config {what}.")


def _matches(module: str, kind: str, names: list[str]) -> bool:
    """Whether names mean a module: `re:` an expression from its start, else its name or its class."""
    return any(re.match(name[3:], module) if name.startswith("re:") else name in (module, kind) for name in names)


def form_of(scheme: Scheme, scale_dtype: torch.dtype) -> LinearForm:
    """This family's form of a scheme with scales of a dtype. Raises `ValueError` for another dtype than its three."""
    name = str(scale_dtype).removeprefix("torch.")
    if name not in SCALE_DTYPES:
        raise ValueError(f"has scales of {name}; those that are read are {list(SCALE_DTYPES)}.")
    return LinearForm(bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric, scale_dtype=name)
