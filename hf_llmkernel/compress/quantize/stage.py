"""`quantize`: matrices as integers in groups that share a scale.

`rtn` rounds every weight to the nearest point of its group's grid. It needs no data. A sparse matrix keeps its mask, a
low-rank linear becomes one of integer factors.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ...model.linear_llm_kernel import pack_weight
from ..block import Block, matrix_form, set_form
from ..inputs import InputStatistic
from ..registry import register
from ..stage import MatrixStage, refuse_form

METHODS = ("rtn",)


@register("quantize")
@dataclass(frozen=True, kw_only=True)
class Quantize(MatrixStage):
    """Stores matrices as integers.

    Args:
        bits: 8 or 4.
        group_size: columns that share a scale; `None` is one scale a row.
        symmetric: a grid around zero; else zero points are stored too.
        method: `"rtn"`, round to nearest.
    """

    bits: int
    group_size: int | None = 64
    symmetric: bool = True
    method: str = "rtn"

    takes_embeddings = True

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in (8, 4):
            raise ValueError(f"bits={self.bits!r}: must be 8 or 4.")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: must be one of {list(METHODS)}.")
        _ = self.form  # whose own rules hold for group_size and symmetric

    @property
    def form(self) -> LinearForm:
        """What a dense matrix becomes."""
        return LinearForm(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def _integer(self, form: LinearForm) -> LinearForm:
        return replace(form, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def plan_matrix(self, layer: LLMKernelConfig, name: str, target: Any) -> dict[str, Any]:
        form = matrix_form(layer, name)
        if form.bits < 16:
            refuse_form("quantize", layer, name, "quantized already: exclude it, or start from a float checkpoint.")
        set_form(layer, name, self._integer(form))
        return {}

    def change(self, block: Block, name: str, inputs: InputStatistic | None, target: Any) -> None:
        block.store(name, block.weight(name), self._integer(block.form(name)), mask=block.mask(name))

    def plan_top(self, config: LLMKernelConfig) -> None:
        if not self.embeddings:
            return
        for name in ("embed_tokens_form",) if config.tie_word_embeddings else ("embed_tokens_form", "lm_head_form"):
            if not LinearForm.from_dict(getattr(config, name)).is_dense:
                raise ValueError(f"quantize: {name} is not dense; leave embeddings out, or use a dense checkpoint.")
            setattr(config, name, self.form.to_dict())

    def apply_top(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor] | None:
        return pack_weight(weight, self.form)
