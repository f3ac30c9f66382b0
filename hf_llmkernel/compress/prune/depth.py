"""`drop_layers`: whole blocks are removed, or single attentions and feed-forwards, and the rest numbered anew.

Block influence (Men et al. 2024, ShortGPT, arXiv 2403.03853): 1 − mean cos(h_in, h_out) over tokens; a block that
hardly turns the hidden states is missed least.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...model.configuration_llm_kernel import LLMKernelConfig
from ..block import Block, skip_sublayer
from ..registry import register
from ..stage import Stage
from .depth_search import drop_by_perplexity

if TYPE_CHECKING:
    from ..survey import Survey

METRICS = ("block_influence", "perplexity")
UNITS = ("layer", "sublayer")


@register("drop_layers")
@dataclass(frozen=True, kw_only=True)
class DropLayers(Stage):
    """Removes layers or sublayers.

    Args:
        count: how many.
        metric: `"block_influence"`, or `"perplexity"`: one at a time, each time the one without which the calibration
            text is predicted best, which takes longer and is better only where no `refit` follows.
        unit: `"layer"`, or `"sublayer"` for single attentions and feed-forwards.
    """

    count: int
    metric: str = "block_influence"
    unit: str = "layer"

    def __post_init__(self):
        super().__post_init__()
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"count={self.count!r}: must be an integer of at least 1; or leave the stage out.")
        for name, legal in (("metric", METRICS), ("unit", UNITS)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {list(legal)}.")

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def is_global(self) -> bool:
        return True

    def check_choice(self, config: LLMKernelConfig) -> None:
        super().check_choice(config)
        found = len(self.candidates([layer.skip or [] for layer in config.per_layer_config]))
        if self.count >= found:
            raise ValueError(f"drop_layers: count={self.count} of {found} {self.unit}s leaves none; lower it.")

    def candidates(self, skips: list[list[str]]) -> list[tuple[int, str]]:
        """What may go: `(layer, "layer")` or `(layer, sublayer)`; an attention of the only layer that attends stays."""
        covered = [index for index in range(len(skips)) if self.covers(index)]
        if self.unit == "layer":
            return [(index, "layer") for index in covered]
        sublayers = ("attention", "mlp")
        return [(index, sublayer) for index in covered for sublayer in sublayers if sublayer not in skips[index]]

    def decide(self, survey: "Survey") -> dict[str, Any]:
        candidates = self.candidates([layer.skip or [] for layer in survey.layers])
        if self.metric == "perplexity":
            dropped, scores = drop_by_perplexity(survey, candidates, self.count)
        else:
            influences = survey.influences(self.unit)
            scores = [
                {"layer": index, "part": part, "influence": influences[index][part]} for index, part in candidates
            ]
            least = sorted(scores, key=lambda entry: entry["influence"])[: self.count]
            dropped = [(entry["layer"], entry["part"]) for entry in least]
        return self._decision(dropped, scores, len(survey.layers))

    def _decision(self, dropped: list[tuple[int, str]], scores: list[dict[str, Any]], count: int) -> dict[str, Any]:
        """Layers that stay, and of them what each is to skip."""
        gone = [[part for index, part in dropped if index == layer] for layer in range(count)]
        kept = [layer for layer in range(count) if "layer" not in gone[layer]]
        targets = [gone[layer] for layer in kept]
        return {"kept": kept, "targets": targets, "dropped": sorted(dropped), "scores": scores}

    def depth(self, decision: dict[str, Any] | None, count: int) -> list[int]:
        if decision is not None:
            return decision["kept"]
        return list(range(count - self.count if self.unit == "layer" else count))

    def assume(self, layers: list[LLMKernelConfig]) -> list[Any]:
        """The last of what may go: which of them it will be takes a look at the activations, their number does not."""
        if self.unit == "layer":
            return super().assume(layers)
        last = self.candidates([layer.skip or [] for layer in layers])[-self.count :]
        return [[part for index, part in last if index == layer] for layer in range(len(layers))]

    def plan(self, layer: LLMKernelConfig, target: list[str] | None = None) -> dict[str, Any]:
        for sublayer in target or []:
            skip_sublayer(layer, sublayer)
        return {"skipped": target} if target else {}

    def begin(self, block: Block, target: list[str] | None = None) -> None:
        for sublayer in target or []:
            block.skip(sublayer)

    def apply(self, block: Block, site: str, inputs: Any, target: Any = None) -> None:
        return None
