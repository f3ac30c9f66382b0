"""`search`: each layer gets one of several ways to compress it, so that the whole loses least within a budget.

What every choice loses in every layer is measured (`table.py`), what it costs is known or timed (`costs.py`); of all
mixes the best within the budget is taken (`knapsack.py`). Losses of layers are taken to add up.

Reading order: settings -> their checks -> the decision -> the plan -> names.
"""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from ... import processes
from ...model.configuration_llm_kernel import LLMKernelConfig
from ..disk import write_json
from ..plan import own_layers, plan_stages
from ..registry import register, stage_from_dict
from ..stage import Stage
from .costs import UNITS, layer_costs
from .knapsack import Front, knapsack_front
from .table import FORK_BYTES, Choice, choice_needs, loss_table, searched_samples

if TYPE_CHECKING:
    from ..survey import Survey

FRONT_BUDGETS = 20  # at which a decision shows the front


@register("search")
@dataclass(frozen=True, kw_only=True)
class Search(Stage):
    """Finds the mix of choices that loses least.

    Args:
        choices: of every layer, each a list of stages that work on single blocks; an empty one leaves the layer as it
            is.
        bytes, parameters, latency: the budget of the layers it covers, in one of these: a share in (0, 1) of what they
            take now, or a number above 1, of latency in milliseconds of one decoded token through all of them.
        tokens: of the calibration text, on which the losses are measured.
    """

    choices: tuple[Choice, ...] = ()
    bytes: float | None = None
    parameters: float | None = None
    latency: float | None = None
    tokens: int = 2048

    def __post_init__(self):
        super().__post_init__()
        if self.include != ("*",) or self.exclude:
            raise ValueError("include and exclude: each stage of choices has its own; set them there.")
        if not isinstance(self.choices, list | tuple) or len(self.choices) < 2:
            raise ValueError(f"choices={self.choices!r}: must be a list of at least two; [] leaves a layer as it is.")
        choices = tuple(_read_choice(number, choice) for number, choice in enumerate(self.choices))
        object.__setattr__(self, "choices", choices)
        self._check_budget()
        if type(self.tokens) is not int or self.tokens < 2:
            raise ValueError(f"tokens={self.tokens!r}: must be an integer of at least 2; 2048 is the default.")

    def _check_budget(self) -> None:
        given = {unit: getattr(self, unit) for unit in UNITS if getattr(self, unit) is not None}
        if len(given) != 1:
            raise ValueError(f"{', '.join(UNITS)}: {len(given)} are set; set exactly one, the budget.")
        for unit, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{unit}={value!r}: must be a share in (0, 1), or a number above 1.")
            if value == 1:
                raise ValueError(f"{unit}={value!r}: is all there is now; set a share below 1, or a number above.")

    @property
    def unit(self) -> str:
        """What the budget is in."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def sweeps_data(self) -> bool:
        return any(stage.needs_data for choice in self.choices for stage in choice)

    @property
    def is_global(self) -> bool:
        return True

    @property
    def solve_products(self) -> float:
        each = [sum(stage.solve_products for stage in choice) for choice in self.choices]
        return sum(each) + max(each)  # all of them to measure, one to make

    def search_work(self, config: LLMKernelConfig) -> tuple[int, int]:
        values = [sum(map(math.prod, layer.linear_shapes().values())) for layer in config.per_layer_config]
        covered, tried = [*filter(self.covers, range(len(values)))], sum(map(bool, self.choices))
        forked = tried * self.tokens
        through = sum(sum(values[index:]) for index in covered) + len(covered) * config.vocab_size * config.hidden_size
        return forked * through, min(forked * len(covered) * config.hidden_size * 4, FORK_BYTES)

    def needs(self, layer: LLMKernelConfig) -> dict[str, str]:
        return choice_needs(self.choices, layer)

    def chosen_stages(self, target: int) -> Choice:
        return self.choices[target]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        flat = replace(self, choices=((), ()))  # whose entries are no dataclasses
        (settings,) = super(Search, flat).to_dict().values()
        settings["choices"] = [[stage.to_dict() for stage in choice] for choice in self.choices]
        return {self.name: settings}

    # Checks

    def check_choice(self, config: LLMKernelConfig) -> None:
        super().check_choice(config)
        dtype = cast(torch.dtype, config.dtype)
        for number, choice in enumerate(self.choices):
            try:
                plan_stages(config, tuple(replace(stage, layers=self.layers) for stage in choice), dtype)
            except ValueError as error:
                raise ValueError(f"search: choices[{number}]: {error}") from None
        if self.unit != "latency":
            layers = [layer for index, layer in enumerate(own_layers(config)) if self.covers(index)]
            self._budget(*self._costs(layers, dtype))

    def _costs(self, layers: Sequence[LLMKernelConfig], dtype: torch.dtype) -> tuple[list[float], list[list[float]]]:
        """What each layer costs now, `[N]`, and in every choice, `[N, C]`."""
        variants = [[layer, *(_planned(choice, layer) for choice in self.choices)] for layer in layers]
        flat = layer_costs(self.unit, [variant for own in variants for variant in own], dtype)
        width = 1 + len(self.choices)
        rows = [flat[begin : begin + width] for begin in range(0, len(flat), width)]
        return [row[0] for row in rows], [row[1:] for row in rows]

    def _budget(self, present: list[float], costs: list[list[float]]) -> float:
        """The budget in its unit. Raises `ValueError` where even the cheapest mix is above it."""
        value = getattr(self, self.unit)
        budget = value if value > 1 else value * sum(present)
        least = sum(map(min, costs))
        if least > budget:
            reachable = f"{least:.6g}" if value > 1 else f"{least / sum(present):.4f}"
            slow = " (a form that is computed as a dense product takes as long)" if self.unit == "latency" else ""
            raise ValueError(
                f"search: {self.unit}={value}: the cheapest mix takes {reachable}{slow}; raise it to that at least, or "
                "add stronger choices."
            )
        return budget

    # The decision

    def decide(self, survey: "Survey") -> dict[str, Any]:
        """The choice of each layer, with the losses it was made by and the front it lies on."""
        ids = cast(torch.Tensor, survey.ids)
        if ids.shape[1] < 2:
            raise ValueError(f"search: calibration.length={ids.shape[1]}: leaves no token to predict; raise it.")
        covered = [index for index in range(len(survey.layers)) if self.covers(index)]
        present, costs = self._timed_once(survey, [survey.layers[index] for index in covered])
        budget = self._budget(present, costs)
        rows = loss_table(survey, covered, self.choices, self.tokens)
        losses = [row["losses"] for row in rows]
        front = knapsack_front(losses, costs)
        point = front.within(budget)
        assert point is not None, "the cheapest mix is on the front"
        chosen = front.choices[point].tolist()
        targets: list[int | None] = [None] * len(survey.layers)
        for index, choice in zip(covered, chosen, strict=True):
            targets[index] = choice
        return {
            "targets": targets,
            "choices": [choice_name(choice) for choice in self.choices],
            "unit": self.unit,
            "present": sum(present),
            "budget": budget,
            "cost": front.costs[point].item(),
            "predicted_loss": front.losses[point].item(),
            "tokens": searched_samples(ids, self.tokens) * ids.shape[1],
            "table": [{**row, "costs": own} for row, own in zip(rows, costs, strict=True)],
            "front": front_points(front),
            "uniform": [
                {"cost": sum(row[number] for row in costs), "loss": sum(row[number] for row in losses)}
                for number in range(len(self.choices))
            ],
        }

    def _timed_once(
        self, survey: "Survey", layers: Sequence[LLMKernelConfig]
    ) -> tuple[list[float], list[list[float]]]:
        """The costs, of which measured ones must not change when the survey is taken up again."""
        file = survey.folder / "costs.json"

        def cost() -> Any:
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, self._costs(layers, survey.dtype))
            return json.loads(file.read_text())

        present, costs = processes.on_first(cost)
        return present, costs

    # The plan

    def plan(self, layer: LLMKernelConfig, target: int | None = None) -> dict[str, Any]:
        """Without a target, the dearest choice within the layer's part of the budget, or else the cheapest.

        Latency is taken to go with bytes then; of a budget in milliseconds nothing is known, and the first is planned.
        """
        choice = self.choices[self._nearest(layer) if target is None else target]
        facts: dict[str, Any] = {}
        for stage in choice:
            facts |= stage.plan(layer)
        return {"choice": choice_name(choice), **facts}

    def _nearest(self, layer: LLMKernelConfig) -> int:
        if self.latency is not None:
            shares = replace(self, latency=None, bytes=self.latency)
            return 0 if self.latency > 1 else shares._nearest(layer)
        (present,), (costs,) = self._costs([layer], cast(torch.dtype, layer.dtype))
        value = getattr(self, self.unit)
        covered = sum(map(self.covers, range(layer.num_hidden_layers)))
        budget = value * present if value < 1 else value / covered
        within = [number for number in range(len(costs)) if costs[number] <= budget]
        return max(within, key=costs.__getitem__) if within else min(range(len(costs)), key=costs.__getitem__)


def front_points(front: Front) -> list[dict[str, float]]:
    """Cost and loss of the best mixes at budgets from the cheapest mix to the dearest, in even steps."""
    budgets = torch.linspace(front.costs[0].item(), front.costs[-1].item(), FRONT_BUDGETS, dtype=torch.float64)
    points = sorted({cast(int, front.within(budget)) for budget in budgets.tolist()})
    return [{"cost": front.costs[point].item(), "loss": front.losses[point].item()} for point in points]


def choice_name(choice: Choice) -> str:
    """A choice in words: its stages with the settings that are not the defaults."""
    return " + ".join(map(_stage_name, choice)) or "as it is"


def _stage_name(stage: Stage) -> str:
    settings = {field.name: getattr(stage, field.name) for field in fields(stage)}
    own = [f"{field.name}={settings[field.name]}" for field in fields(stage) if settings[field.name] != field.default]
    return " ".join([stage.name, *own])


def _read_choice(number: int, choice: Any) -> Choice:
    """The stages of a choice, each of them one that works on single blocks alone."""
    where = f"choices[{number}]"
    if not isinstance(choice, list | tuple):
        raise ValueError(f"{where}={choice!r}: must be a list of stages; [] leaves a layer as it is.")
    try:
        stages = tuple(stage if isinstance(stage, Stage) else stage_from_dict(stage) for stage in choice)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    for stage in stages:
        if stage.is_global:
            raise ValueError(f"{where}: {stage.name} decides over all layers at once; make it a stage of its own.")
        if stage.writes_whole:
            raise ValueError(f"{where}: {stage.name} is the last stage of a recipe; add it behind search.")
        if stage.needs_reference:
            raise ValueError(f"{where}: {stage.name} compares with the uncompressed model; add it behind search.")
        if stage.layers is not None:
            raise ValueError(f"{where}: {stage.name}: layers={list(stage.layers)}; set the layers of search instead.")
        if stage.embeddings:
            raise ValueError(f"{where}: {stage.name}: embeddings=true; add a stage of its own for them behind search.")
    return stages


def _planned(choice: Choice, layer: LLMKernelConfig) -> LLMKernelConfig:
    """A layer's configuration after a choice."""
    planned = copy.deepcopy(layer)
    for stage in choice:
        stage.plan(planned)
    return planned
