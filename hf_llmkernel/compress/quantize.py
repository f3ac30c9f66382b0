"""`quantize`: linears as integers in groups that share a scale.

`rtn` rounds every weight to the nearest point of its group's grid. It needs no data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ..model.linear_llm_kernel import pack_weight
from .block import Block
from .registry import register
from .stage import Stage

METHODS = ("rtn",)


@register("quantize")
@dataclass(frozen=True, kw_only=True)
class Quantize(Stage):
    """Stores linears as integers.

    Args:
        bits: 8 or 4.
        group_size: columns that share a scale; `None` is one scale a row.
        symmetric: a grid around zero; else zero points are stored too.
        method: `"rtn"`, round to nearest.
        include: leaf names or globs (`q_proj`, `*_proj`) of the linears to store so; by default all of a block.
        exclude: those to leave out.
        embeddings: also the token embedding and the head.
    """

    bits: int
    group_size: int | None = 64
    symmetric: bool = True
    method: str = "rtn"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    embeddings: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in (8, 4):
            raise ValueError(f"bits={self.bits!r}: must be 8 or 4.")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: must be one of {list(METHODS)}.")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"{name}={patterns!r}: must be a list of names or globs, such as [q_proj, '*_proj'].")
            object.__setattr__(self, name, tuple(patterns))
        if not isinstance(self.embeddings, bool):
            raise ValueError(f"embeddings={self.embeddings!r}: must be true or false.")
        _ = self.form  # whose own rules hold for group_size and symmetric

    @property
    def form(self) -> LinearForm:
        """What every chosen linear becomes."""
        return LinearForm(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def chosen(self, leaves: list[str]) -> list[str]:
        """Those of a layer's linears that it works on. Raises `ValueError` for a name or glob that none of them has."""
        for pattern in (*self.include, *self.exclude):
            if not any(fnmatchcase(leaf, pattern) for leaf in leaves):
                raise ValueError(f"quantize: {pattern!r} matches no linear; those of this model are {leaves}.")
        matches = {leaf: [fnmatchcase(leaf, pattern) for pattern in self.include] for leaf in leaves}
        return [leaf for leaf in leaves if any(matches[leaf]) and not self._excludes(leaf)]

    def _excludes(self, leaf: str) -> bool:
        return any(fnmatchcase(leaf, pattern) for pattern in self.exclude)

    def plan(self, layer: LLMKernelConfig) -> dict[str, Any]:
        leaves = self.chosen(list(layer.linear_shapes()))
        forms = dict(layer.linear_forms or {})
        for leaf in leaves:
            if not layer.linear_form(leaf).is_dense:
                raise ValueError(
                    f"quantize: {leaf} is stored as {layer.linear_form(leaf).to_dict()}, only dense linears can be "
                    "quantized; exclude it, or start from a dense checkpoint."
                )
            forms[leaf] = {**self.form.to_dict(), **_own_bias(forms.get(leaf))}
        layer.linear_forms = forms
        return {"linears": leaves}

    def plan_top(self, config: LLMKernelConfig) -> None:
        if not self.embeddings:
            return
        for name in ("embed_tokens_form",) if config.tie_word_embeddings else ("embed_tokens_form", "lm_head_form"):
            if not LinearForm.from_dict(getattr(config, name)).is_dense:
                raise ValueError(f"quantize: {name} is not dense; leave embeddings out, or use a dense checkpoint.")
            setattr(config, name, self.form.to_dict())

    def apply(self, block: Block, statistics: Mapping[str, Any]) -> None:
        self.plan(block.layer)
        for leaf in self.chosen(list(block.layer.linear_shapes())):
            if leaf in block.linears():
                block.pack(leaf, self.form)

    def apply_top(self, weight: torch.Tensor) -> dict[str, torch.Tensor] | None:
        return pack_weight(weight.float(), self.form) if self.embeddings else None


def _own_bias(form: Mapping[str, Any] | None) -> dict[str, Any]:
    """The bias that a linear's form decides for itself, which quantization keeps."""
    return {} if form is None or form.get("bias") is None else {"bias": form["bias"]}
