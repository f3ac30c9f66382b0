"""A run: a recipe's stages in phases, each a decision over all layers where its first stage needs one, then a sweep.

    stages   prune_ffn  sparsify (owl)  quantize   drop_layers
    phases   [prune_ffn] [sparsify, quantize]      [drop_layers]

A phase begins with every stage that is global, because it must see the whole model as the stages before it left it; and
behind a stage that changes what runs between the blocks, as the width of the residual stream.
Decisions are written to `plan.json` once they are made.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .. import processes
from ..checkpoint.model_folder import ModelFolder
from ..kernels import disabled
from ..model.configuration_llm_kernel import LLMKernelConfig
from .cast import Cast
from .disk import write_json
from .plan import keep_layers, own_layers, variants
from .recipe import Recipe
from .stage import Stage
from .survey import Survey
from .sweep import Clock, Step, Sweep

SECONDS_FILE = "seconds.json"


class Run:
    """A recipe on a checkpoint.

    Args:
        source: the checkpoint.
        recipe: what to do.
        dtype: of what stays floating.
        ids: calibration tokens `[S, T]`, or `None`.
        work: folder for what an interrupted run needs to go on.
        progress: whether to draw bars.
    """

    def __init__(
        self,
        source: ModelFolder,
        recipe: Recipe,
        dtype: torch.dtype,
        ids: torch.Tensor | None,
        work: Path,
        progress: bool,
    ):
        self.source = source
        self.recipe = recipe
        self.dtype = dtype
        self.ids = ids
        self.work = work
        self.progress = progress
        self.clock = Clock(work / SECONDS_FILE)
        self._outcomes: list[dict[str, Any]] = []

    @disabled()  # native kernels round activations to integers: statistics would depend on the machine
    def run(self) -> ModelFolder:
        """All phases, but for those that an interrupted run has done; returns the folder of the last sweep."""
        groups = phases(self.recipe.stages)
        done = processes.on_first(lambda: sum(self._outcome_file(number).is_file() for number in range(len(groups))))
        current = ModelFolder(self._sweep_folder(done - 1)) if done else self.source
        layers = json.loads(self._outcome_file(done - 1).read_text())["layers"] if done else self._all_layers()
        for number in range(done, len(groups)):
            current, layers = self._phase(number, groups[number], current, layers)
        self._outcomes = [json.loads(self._outcome_file(number).read_text()) for number in range(len(groups))]
        return current

    def outcome(self) -> list[dict[str, Any]]:
        """One entry a stage: its settings, what it reached, and what it decided."""
        return [stage for outcome in self._outcomes for stage in outcome["stages"]]

    def notes(self) -> list[dict[str, Any]]:
        """What stages told of single layers."""
        return [note for outcome in self._outcomes for note in outcome["notes"]]

    @property
    def calibration_tokens(self) -> int:
        """Tokens that run through the model."""
        return 0 if self.ids is None else self.ids.numel()

    def _all_layers(self) -> list[int]:
        return list(range(self.source.config.num_hidden_layers))

    def _phase(
        self, number: int, stages: list[Stage], current: ModelFolder, layers: list[int]
    ) -> tuple[ModelFolder, list[int]]:
        """A decision, a sweep, and the file that says that both are done; then the sweep before it can go.

        `layers` says of each layer of `current` which one of the source it was made of; so does what is returned.
        """
        decision = self._decide(number, stages[0], current, layers) if stages[0].is_global else None
        kept = stages[0].depth(decision, current.config.num_hidden_layers)
        if len(kept) < current.config.num_hidden_layers:
            current = current.restricted(keep_layers(current.config, kept), kept)
            layers = [layers[index] for index in kept]
        steps = [self._decided(stages[0], decision), *map(Step, stages[1:])]
        folder, origin = self._sweep_folder(number), (self.source, layers)
        sweep = Sweep(
            current, steps, folder, self.dtype, self.ids, self.progress, self.clock, origin, self._computes()
        )
        result = sweep.run()

        def settle() -> None:
            outcome = {
                "stages": reached(steps, current.config, decision),
                "notes": numbered(sweep.notes()),
                "layers": layers,
            }
            write_json(self._outcome_file(number), outcome)
            if number > 0:
                shutil.rmtree(self._sweep_folder(number - 1), ignore_errors=True)

        processes.on_first(settle)
        return result, layers

    def _decided(self, stage: Stage, decision: dict[str, Any] | None) -> Step:
        if decision is None:
            return Step(stage)
        file = decision.pop("tensors", None)  # is gone when the run is, so no report names it
        return Step(stage, decision.get("targets"), None if file is None else load_file(self.work / file))

    def _computes(self) -> torch.dtype:
        """The dtype of the finished model: that of a stage `cast`, else of what stays floating."""
        casts = [stage.dtype for stage in self.recipe.stages if isinstance(stage, Cast)]
        return getattr(torch, casts[0]) if casts else self.dtype

    def _sweep_folder(self, number: int) -> Path:
        return self.work / f"sweep-{number:02d}"

    def _outcome_file(self, number: int) -> Path:
        return self.work / f"phase-{number:02d}.json"

    def _decide(self, number: int, stage: Stage, current: ModelFolder, layers: list[int]) -> dict[str, Any]:
        """The phase's decision, from `plan.json` where it was made before; of several processes, the first one's."""
        file = self.work / "plan.json"
        decisions = processes.on_first(lambda: json.loads(file.read_text()) if file.is_file() else {})
        if str(number) in decisions:
            return decisions[str(number)]
        folder = self.work / f"survey-{number:02d}"
        survey = Survey(current, self.ids, self.dtype, folder, self.progress, layers)
        with torch.no_grad():
            decision = self.clock.time("survey", lambda: stage.decide(survey))

        def settle() -> dict[str, Any]:
            self.clock.save()
            write_json(file, {**decisions, str(number): decision})
            shutil.rmtree(folder, ignore_errors=True)
            return decision

        return processes.on_first(settle)


def reached(steps: list[Step], before: LLMKernelConfig, decision: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What each stage of a phase reached, which follows from the configuration before it and its decision."""
    layers, entries = own_layers(before), []
    for step in steps:
        results = {
            index: step.stage.plan(layer, step.target(index))
            for index, layer in enumerate(layers)
            if step.stage.covers(index)
        }
        entries.append({**step.stage.to_dict(), "result": variants(results)})
    if decision is not None:
        entries[0]["decision"] = decision
    return entries


def numbered(notes: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Notes of all layers, each with its layer."""
    return [{"layer": layer, **note} for layer, found in enumerate(notes) for note in found]


def phases(stages: tuple[Stage, ...]) -> list[list[Stage]]:
    """The stages in groups that one sweep applies."""
    groups: list[list[Stage]] = []
    for stage in stages:
        if stage.is_global or not groups or groups[-1][0].alone:
            groups.append([])
        groups[-1].append(stage)
    return groups
