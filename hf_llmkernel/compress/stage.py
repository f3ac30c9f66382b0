"""What every stage of a recipe is: its settings, the shapes it decides, and what it does to one block.

A block-local stage is a frozen dataclass of settings, registered under its recipe name, with up to five methods:

    plan            shapes and forms of one layer after it, or why it cannot be; also run on its own, before any work
    plan_top        the same for the embedding and the head
    statistics      what it wants to know about the inputs of linears; nothing, if it needs no calibration
    apply           the work on one block
    apply_top       the work on the embedding or the head
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from ..model.configuration_llm_kernel import LLMKernelConfig
from .block import Block
from .statistics import InputStatistic


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A block-local stage.

    Args:
        layers: `[first, end]`, the layers it works on, `end` left out as in Python; by default all.
    """

    name: ClassVar[str] = ""
    layers: tuple[int, int] | None = None

    def __post_init__(self):
        if self.layers is None:
            return
        numbers = isinstance(self.layers, list | tuple) and all(type(number) is int for number in self.layers)
        if not numbers or len(self.layers) != 2 or not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"layers={self.layers!r}: must be [first, end] with 0 <= first < end; null takes all.")
        object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def needs_data(self) -> bool:
        """Whether calibration hidden states have to run through the blocks."""
        return False

    def covers(self, index: int) -> bool:
        """Whether it works on layer `index`."""
        return self.layers is None or self.layers[0] <= index < self.layers[1]

    def check_layers(self, count: int) -> None:
        """Raises `ValueError` where it names layers that a model of `count` does not have."""
        if self.layers is not None and self.layers[1] > count:
            raise ValueError(f"{self.name}: layers={list(self.layers)} is beyond the {count} layers of the model.")

    def plan(self, layer: LLMKernelConfig) -> dict[str, Any]:
        """Gives a layer's own configuration its new shapes and forms; returns what is worth reporting of them."""
        raise TypeError(f"{type(self).__name__} does not say what shapes it makes")

    def plan_top(self, config: LLMKernelConfig) -> None:
        """Gives the embedding and the head their new forms; by default they stay."""

    def statistics(self, block: Block) -> Mapping[str, InputStatistic]:
        """`{leaf name: statistic of that linear's inputs}` to be filled before `apply`."""
        return {}

    def apply(self, block: Block, statistics: Mapping[str, Any]) -> None:
        """Does the work on a block, its configuration included; `statistics` are the filled ones."""
        raise TypeError(f"{type(self).__name__} does not say what it does to a block")

    def apply_top(self, weight: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """The stored tensors `{suffix: tensor}` of an embedding or head `[V, H]`; `None` where it stays as it is."""
        return None

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The recipe's entry, every setting written out."""
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {self.name: settings}
