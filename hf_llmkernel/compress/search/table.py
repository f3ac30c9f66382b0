"""The loss table: what every choice loses in every layer, when it is made in that layer alone.

One walk over the unchanged blocks shows what enters each layer's linears. There every choice is made on a copy of the
block, and from there hidden states of a few samples fork. Forks of several layers, as many as fit in memory, go on side
by side to the head, so that each block is read once for all of them.

    block 0        block 1        block 2 ...                      head
    ─┬─ unchanged ─┬───────────── ...
     ├─ choice 0 ──│───────────── ...                              loss of choice 0 in layer 0
     └─ choice 1 ──│───────────── ...                              loss of choice 1 in layer 0
                   ├─ choice 0 ── ...                              loss of choice 0 in layer 1

Losses are compared with the unchanged model's piece by piece of the same text, which takes out most of their noise.

Reading order: loss_table -> the walk -> one layer's forks -> a group of forks to the end -> losses -> rows.

Shapes: S samples, T tokens a sample, H hidden_size.
"""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from tqdm import tqdm

from ...checkpoint.model_folder import Positions
from ...evaluate.quality import LOGIT_ROWS
from ...model.configuration_llm_kernel import LLMKernelConfig
from .. import processes
from ..block import SITES, Block
from ..disk import write_json, write_tensors
from ..inputs import NEEDS, InputStatistic
from ..stage import Stage
from ..walk import Walk, accelerator, fast_products

if TYPE_CHECKING:
    from ..survey import Survey

FORK_BYTES = 512 << 20  # of hidden states that go on side by side
PIECE_TOKENS = 64  # the losses of neighbouring tokens hang together: noise is judged from piece to piece
UNCHANGED = "unchanged"
Choice = tuple[Stage, ...]


@torch.no_grad()
def loss_table(
    survey: "Survey", layers: Sequence[int], choices: Sequence[Choice], tokens: int
) -> list[dict[str, Any]]:
    """The change of the calibration text's loss for every choice in every layer, one row a layer.

    Interrupted, it goes on behind the last layer whose choices were made.

    Args:
        survey: of the model as it is.
        layers: numbers of those that have a choice, ascending.
        choices: stages of each; none leaves the layer as it is, and loses nothing.
        tokens: of the calibration text, the first ones, at most.

    Returns:
        `{"layer", "losses", "standard_errors"}`: nats a token more than the unchanged model, one entry a choice.

    Raises:
        ValueError: a choice whose loss is not finite, naming the layer.
    """
    table = LossTable(survey, layers, choices, tokens)
    table.measure()
    return table.rows()


class LossTable:
    """What `loss_table` works on; see there."""

    def __init__(self, survey: "Survey", layers: Sequence[int], choices: Sequence[Choice], tokens: int):
        assert survey.ids is not None, "a stage that measures losses says needs_data"
        self.survey = survey
        self.layers = list(layers)
        self.choices = choices
        # [S, T], the first ones of this process's walk
        self.ids = processes.own(survey.ids[: searched_samples(survey.ids, tokens)])
        self.groups = self._groups(self.ids.numel() * survey.config.hidden_size * 4)

    def _groups(self, fork_bytes: int) -> list[list[int]]:
        """The layers in runs whose forks fit in memory together."""
        most = max(FORK_BYTES // max(fork_bytes * len(self.choices), 1), 1)
        return [self.layers[begin : begin + most] for begin in range(0, len(self.layers), most)]

    def measure(self) -> None:
        """The walk over the unchanged blocks; a group of forks goes on to the end when its last layer has been seen."""
        todo = self._unfinished()
        if not todo:
            return
        walk = self.survey.walk()
        bar = tqdm(total=todo[-1] + 1, initial=walk.index, desc="measuring", disable=not self.survey.progress)
        with bar:
            for index in range(walk.index, todo[-1] + 1):
                self._measure_layer(walk, index, todo)
                self.survey.note(index, {})
                walk.settle()
                bar.update()
        walk.close()

    def _unfinished(self) -> list[int]:
        """Layers whose losses are not written yet, by any of the processes."""
        missing = {index for index in self.layers if not self._losses(index).is_file()}
        return sorted(set.union(*processes.gather(missing)))

    def _measure_layer(self, walk: Walk, index: int, todo: list[int]) -> None:
        block, seen = self.survey.block(index), {}
        entering = walk.states.read(0, len(self.ids))
        needs = choice_needs(self.choices, block.layer) if index in todo else {}
        advance = index + 1 < self.survey.config.num_hidden_layers
        walk.run(block, needs, lambda site, inputs: seen.update({site: inputs}), advance)
        if index not in todo:
            return
        self._fork(block, entering, seen)
        for group in self.groups:
            if group[-1] == index:
                self._finish([layer for layer in group if layer in todo])

    # Forks

    def _fork(self, block: Block, entering: torch.Tensor, seen: Mapping[str, InputStatistic | None]) -> None:
        """Writes the states `[S, T, H]` after a layer in each of its choices; in the first one, unchanged too."""
        given = self._positions().arguments(block.index)

        def after(changed: Block) -> torch.Tensor:
            states = entering.to(accelerator(), copy=True)
            return run_block(changed.module().to(states.device), states, given).cpu()

        forks = {UNCHANGED: after(block)} if block.index == self.layers[0] else {}
        for number, choice in enumerate(self.choices):
            if choice:
                changed = applied(block, choice, seen)
                changed.cast(self.survey.dtype)
                forks[str(number)] = after(changed)
        self._forks(block.index).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self._forks(block.index), forks)

    def _finish(self, group: list[int]) -> None:
        """Takes the forks of a group's layers to the head, and writes their losses."""
        device, source = accelerator(), self.survey.source
        forks = {index: load_file(self._forks(index), str(device)) for index in group}
        positions = self._positions()
        later = range(group[0] + 1, len(self.survey.layers))
        for index in tqdm(later, f"choices in {len(group)} layers", disable=not self.survey.progress):
            module, given = source.block(index).to(device), positions.arguments(index)
            for layer, choices in forks.items():
                for states in choices.values() if layer < index else ():
                    run_block(module, states, given)
        norm, head, ids = source.norm().to(device), source.head().to(device), self.ids.to(device)
        for index, choices in forks.items():
            pieces = {name: piece_losses(states, ids, norm, head) for name, states in choices.items()}
            self._write(index, pieces)

    def _write(self, index: int, pieces: dict[str, list[float]]) -> None:
        """The losses of all processes' pieces, for each of them; the forks have done their work."""
        found = processes.gather(pieces)
        write_json(self._losses(index), {name: [loss for own in found for loss in own[name]] for name in pieces})
        processes.wait()
        self._forks(index).unlink()

    # Rows

    def rows(self) -> list[dict[str, Any]]:
        """The table, from what was written."""
        unchanged = json.loads(self._losses(self.layers[0]).read_text())[UNCHANGED]
        return [self._row(index, unchanged) for index in self.layers]

    def _row(self, index: int, unchanged: list[float]) -> dict[str, Any]:
        pieces = json.loads(self._losses(index).read_text())
        assert self.survey.ids is not None
        length = self.survey.ids.shape[1]
        tokens = len(unchanged) // len(piece_sizes(length)) * (length - 1)
        losses, errors = [], []
        for number in range(len(self.choices)):
            after = pieces.get(str(number), unchanged)
            loss, error = mean_difference(after, unchanged, tokens)
            if not math.isfinite(loss):
                raise ValueError(f"search: choices[{number}] in layer {index} has no finite loss; leave it out.")
            losses.append(loss)
            errors.append(error)
        return {"layer": index, "losses": losses, "standard_errors": errors}

    def _positions(self) -> Positions:
        return Positions(self.survey.config, self.ids.shape[1], accelerator())

    def _forks(self, index: int) -> Path:
        return processes.own_folder(self.survey.folder) / f"forks-{index:05d}.safetensors"

    def _losses(self, index: int) -> Path:
        return processes.own_folder(self.survey.folder) / f"losses-{index:05d}.json"


def searched_samples(ids: torch.Tensor, tokens: int) -> int:
    """How many of the samples `[S, T]` losses are measured on: whole ones, at least one."""
    return min(max(tokens // ids.shape[1], 1), len(ids))


def choice_needs(choices: Sequence[Choice], layer: LLMKernelConfig) -> dict[str, str]:
    """What all choices together want to know of a layer's inputs, as `Stage.needs`."""
    needs: dict[str, str] = {}
    for choice in choices:
        planned = copy.deepcopy(layer)
        for stage in choice:
            for site, need in stage.needs(planned).items():
                needs[site] = max(need, needs.get(site, NEEDS[0]), key=NEEDS.index)
            stage.plan(planned)
    return needs


def applied(block: Block, choice: Choice, seen: Mapping[str, InputStatistic | None]) -> Block:
    """A copy of a block after a choice's stages; what they know of the inputs is how they were before any of them."""
    changed, known = copy.deepcopy(block), dict(seen)
    for stage in choice:
        stage.begin(changed)
    for _, stages in groupby(choice, lambda stage: stage.structural):
        together = list(stages)
        for site in SITES:
            for stage in together:
                stay, inputs = stage.apply(changed, site, known.get(site)), known.get(site)
                if stay is not None and inputs is not None:
                    known[site] = inputs.keep(stay)
    return changed


def run_block(block: torch.nn.Module, states: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """States `[S, T, H]` after a block, in place."""
    with fast_products():
        for samples in states.split(4) if len(states) else ():
            samples.copy_(block(samples, **given))
    return states


def piece_sizes(length: int) -> list[int]:
    """Tokens predicted in each piece of a sample of `length` tokens."""
    predicted = length - 1
    return [min(PIECE_TOKENS, predicted - begin) for begin in range(0, predicted, PIECE_TOKENS)]


def piece_losses(states: torch.Tensor, ids: torch.Tensor, norm: Any, head: Any) -> list[float]:
    """Summed nats of the tokens of every piece of samples `[S, T]`, from their last states `[S, T, H]`."""
    losses = []
    for sample, tokens in zip(states, ids, strict=True):
        with fast_products():
            logits = (head(norm(rows)) for rows in sample[:-1].split(LOGIT_ROWS))
            targets = tokens[1:].split(LOGIT_ROWS)
            pairs = zip(logits, targets, strict=True)
            each = torch.cat([F.cross_entropy(rows, own, reduction="none") for rows, own in pairs])  # [T - 1]
        losses += [piece.double().sum().item() for piece in each.split(piece_sizes(len(tokens)))]
    return losses


def mean_difference(after: list[float], before: list[float], tokens: int) -> tuple[float, float | None]:
    """The difference a token of losses summed by pieces, and its standard error; `None` where there is one piece."""
    differences = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    count = len(differences)
    error = differences.std().item() * math.sqrt(count) / tokens if count > 1 else None
    return differences.sum().item() / tokens, error
