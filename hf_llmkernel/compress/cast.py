"""`cast`: what is floating becomes float16 or bfloat16 when the result is written, and what that loses is counted.

float16 has 11 significant bits and nothing above 65504 or, rounded, below 3e-8; bfloat16 has 8 bits and the range of
float32. Stages before it work on the values as they were.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..checkpoint.model_folder import EXACT_SUFFIXES
from ..checkpoint.precision import cast_values
from ..checkpoint.reader import CheckpointReader
from ..model.configuration_llm_kernel import LLMKernelConfig
from .block import Block
from .inputs import InputStatistic
from .registry import register
from .stage import Stage

DTYPES = ("float16", "bfloat16")
OVERFLOWS = ("refuse", "clamp")


@register("cast")
@dataclass(frozen=True, kw_only=True)
class Cast(Stage):
    """Stores what is floating in 16 bits; scales and zero points of integers keep the dtypes of their forms.

    Args:
        dtype: `"float16"` or `"bfloat16"`.
        overflow: what becomes of floating values beyond its range: `"refuse"` ends the run before any work is done,
            `"clamp"` stores the largest number instead.

    Integers and low ranks that stand for values beyond it cannot be clamped: a run ends at the first, whatever
    `overflow` says. Activations may be beyond it where no weight is, with clamped weights above all; that is not looked
    for, and perplexities are computed in fp32.
    """

    dtype: str
    overflow: str = "refuse"

    writes_whole: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: must be one of {list(DTYPES)}.")
        if self.overflow not in OVERFLOWS:
            raise ValueError(f"overflow={self.overflow!r}: must be one of {list(OVERFLOWS)}.")
        if self.include != ("*",) or self.exclude or self.layers is not None:
            raise ValueError("include, exclude and layers: a model has one dtype; leave them out.")

    def plan(self, layer: LLMKernelConfig, target: Any = None) -> dict[str, Any]:
        return {"dtype": self.dtype}

    def apply(self, block: Block, site: str, inputs: InputStatistic | None, target: Any = None) -> torch.Tensor | None:
        return None

    def plan_whole(self, config: LLMKernelConfig) -> None:
        config.dtype = getattr(torch, self.dtype)

    def check_range(self, reader: CheckpointReader) -> None:
        """Raises `ValueError` for a checkpoint with values beyond the range, unless they are to be clamped."""
        for name in reader if self.overflow == "refuse" else ():
            if is_cast(name, reader.dtype(name)):
                for _ in Precision(self).blocks(name, reader.blocks(name)):
                    pass


@dataclass
class Precision:
    """What a cast lost, counted while it is written.

    Args:
        stage: the cast.
        tensors: one entry a tensor that lost any: `overflowed` values beyond the range, `underflowed` ones that became
            zero, `subnormal` ones that kept fewer bits than others, and the `largest` magnitude before.
        values: cast in all.
    """

    stage: Cast
    tensors: list[dict[str, Any]] = field(default_factory=list)
    values: int = 0

    def blocks(self, name: str, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The pieces of a tensor, cast.

        Raises:
            ValueError: values beyond the range, unless they are to be clamped.
        """
        total = {"overflowed": 0, "underflowed": 0, "subnormal": 0}
        largest = 0.0
        for block in blocks:
            rounded, lost = cast_values(block, getattr(torch, self.stage.dtype))
            largest = max(largest, float(block.abs().max())) if block.numel() else largest
            total = {kind: total[kind] + count for kind, count in lost.items()}
            self.values += block.numel()
            if total["overflowed"] and self.stage.overflow == "refuse":
                raise ValueError(
                    f"cast: {name} has values beyond the range of {self.stage.dtype}, up to {largest:.4g}; choose "
                    "bfloat16, or overflow: clamp."
                )
            yield rounded
        if any(total.values()):
            self.tensors.append({"tensor": name, **total, "largest": largest})

    def summary(self) -> dict[str, Any]:
        """Settings, totals, and the tensors that lost any, as JSON."""
        kinds = ("overflowed", "underflowed", "subnormal")
        totals = {kind: sum(tensor[kind] for tensor in self.tensors) for kind in kinds}
        settings = {"dtype": self.stage.dtype, "overflow": self.stage.overflow}
        return {**settings, "values": self.values, **totals, "tensors": self.tensors}


def is_cast(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor follows the model's dtype."""
    return dtype.is_floating_point and name.rpartition(".")[2] not in EXACT_SUFFIXES
