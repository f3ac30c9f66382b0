"""A run: a recipe's stages in phases, each a decision over all layers where its first stage needs one, then a sweep.

    stages   prune_ffn  sparsify (owl)  quantize   drop_layers
    phases   [prune_ffn] [sparsify, quantize]      [drop_layers]

A phase begins with every stage that is global, because it must see the whole model as the stages before it left it.
Decisions are written to `plan.json` once they are made.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.model_folder import ModelFolder
from . import processes
from .disk import write_json
from .plan import keep_layers, own_layers, variants
from .recipe import Recipe
from .stage import Stage
from .survey import Survey
from .sweep import Clock, Step, Sweep


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
        self.clock = Clock()
        self._stages: list[dict[str, Any]] = []
        self._notes: list[dict[str, Any]] = []

    def run(self) -> ModelFolder:
        """All phases; returns the folder of the last sweep."""
        current = self.source
        for number, stages in enumerate(phases(self.recipe.stages)):
            decision = self._decide(number, stages[0], current) if stages[0].is_global else None
            kept = stages[0].depth(decision, current.config.num_hidden_layers)
            if len(kept) < current.config.num_hidden_layers:
                current = current.restricted(keep_layers(current.config, kept), kept)
            targets = None if decision is None else decision.get("targets")
            steps = [Step(stage, targets if stage is stages[0] else None) for stage in stages]
            before, current = current, self._sweep(number, steps, current)
            self._report(steps, before, decision)
            if before.folder.parent == self.work and number > 0 and processes.is_first():
                shutil.rmtree(before.folder, ignore_errors=True)
        return current

    def outcome(self) -> list[dict[str, Any]]:
        """One entry a stage: its settings, what it reached, and what it decided."""
        return self._stages

    def notes(self) -> list[dict[str, Any]]:
        """What stages told of single layers."""
        return self._notes

    def _decide(self, number: int, stage: Stage, current: ModelFolder) -> dict[str, Any]:
        """The phase's decision, from `plan.json` where it was made before; of several processes, the first one's."""
        file = self.work / "plan.json"
        decisions = processes.on_first(lambda: json.loads(file.read_text()) if file.is_file() else {})
        if str(number) in decisions:
            return decisions[str(number)]
        folder = self.work / f"survey-{number:02d}"
        survey = Survey(current, self.ids, self.dtype, folder, self.progress)
        with torch.no_grad():
            decision = self.clock.time("survey", lambda: stage.decide(survey))

        def settle() -> dict[str, Any]:
            write_json(file, {**decisions, str(number): decision})
            shutil.rmtree(folder, ignore_errors=True)
            return decision

        return processes.on_first(settle)

    def _sweep(self, number: int, steps: list[Step], current: ModelFolder) -> ModelFolder:
        sweep = Sweep(
            current, steps, self.work / f"sweep-{number:02d}", self.dtype, self.ids, self.progress, self.clock
        )
        result = sweep.run()
        for layer, notes in enumerate(sweep.notes()):
            self._notes += [{"layer": layer, **note} for note in notes]
        return result

    def _report(self, steps: list[Step], before: ModelFolder, decision: dict[str, Any] | None) -> None:
        """What each stage of a phase reached, which follows from the configuration and its decision."""
        layers = own_layers(before.config)
        for step in steps:
            results = {
                index: step.stage.plan(layer, step.target(index))
                for index, layer in enumerate(layers)
                if step.stage.covers(index)
            }
            entry = {**step.stage.to_dict(), "result": variants(results)}
            if step.stage is steps[0].stage and decision is not None:
                entry["decision"] = decision
            self._stages.append(entry)


def phases(stages: tuple[Stage, ...]) -> list[list[Stage]]:
    """The stages in groups that one sweep applies."""
    groups: list[list[Stage]] = []
    for stage in stages:
        if stage.is_global or not groups:
            groups.append([])
        groups[-1].append(stage)
    return groups
