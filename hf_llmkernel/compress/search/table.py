"""The loss table: what every choice loses in every layer, when it is made in that layer alone.

One walk over the unchanged blocks shows what enters each layer's linears. There every choice is made on a copy of the
block, and from there hidden states of a few samples fork. Forks of several layers, as many as fit in memory, go on side
by side to the head, so that each block is read once for all of them.

    block 0        block 1        block 2 ...                      head
    ─┬─ unchanged ─┬───────────── ...
     ├─ choice 0 ──│───────────── ...                              loss of choice 0 in layer 0
     └─ choice 1 ──│───────────── ...                              loss of choice 1 in layer 0
                   ├─ choice 0 ── ...                              loss of choice 0 in layer 1

A loss is how far the distribution of the next token moves from the unchanged model's, as Kullback-Leibler divergence.
What the text's own tokens lose is the same on average, but far noisier: of so many choices the luckiest would win.

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

from ... import processes
from ...checkpoint.model_folder import Positions
from ...evaluate.quality import LOGIT_ROWS
from ...model.configuration_llm_kernel import LLMKernelConfig
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
    """What every choice in every layer loses on the calibration text, one row a layer.

    Interrupted, it goes on behind the last layer whose choices were made.

    Args:
        survey: of the model as it is.
        layers: numbers of those that have a choice, ascending.
        choices: stages of each; none leaves the layer as it is, and loses nothing.
        tokens: of the calibration text, the first ones, at most.

    Returns:
        `{"layer", "losses", "standard_errors"}`: nats of divergence a token, one entry a choice.

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
        unchanged = self._unchanged(forks[group[0]]).to(device)
        norm, head = source.norm().to(device), source.head().to(device)
        for index, choices in forks.items():
            self._write(index, piece_losses(choices, unchanged, norm, head))

    def _unchanged(self, first: dict[str, torch.Tensor]) -> torch.Tensor:
        """The unchanged model's last states `[S, T, H]`: the first of all groups takes them there, the others read."""
        file = processes.own_folder(self.survey.folder) / "unchanged.safetensors"
        if UNCHANGED in first:
            write_tensors(file, {UNCHANGED: first.pop(UNCHANGED)})
        return load_file(file)[UNCHANGED]

    def _write(self, index: int, pieces: dict[str, list[float]]) -> None:
        """The losses of all processes' pieces, for each of them; the forks have done their work."""
        found = processes.gather(pieces)
        write_json(self._losses(index), {name: [loss for own in found for loss in own[name]] for name in pieces})
        processes.wait()
        self._forks(index).unlink()

    # Rows

    def rows(self) -> list[dict[str, Any]]:
        """The table, from what was written."""
        return [self._row(index) for index in self.layers]

    def _row(self, index: int) -> dict[str, Any]:
        pieces = json.loads(self._losses(index).read_text())
        assert self.survey.ids is not None
        length = self.survey.ids.shape[1]
        losses, errors = [], []
        for number in range(len(self.choices)):
            # A choice without stages changes nothing.
            loss, error = mean_loss(pieces[str(number)], length) if self.choices[number] else (0.0, 0.0)
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
                change, inputs = stage.apply(changed, site, known.get(site)), known.get(site)
                if change is not None and inputs is not None:
                    known[site] = inputs.after(change)
    return changed


def run_block(block: torch.nn.Module, states: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """States `[S, T, H]` after a block, in place."""
    with fast_products():
        for samples in states.split(4) if len(states) else ():
            samples.copy_(block(samples, **given))
    return states


def piece_losses(
    forks: Mapping[str, torch.Tensor], unchanged: torch.Tensor, norm: Any, head: Any
) -> dict[str, list[float]]:
    """Summed nats of divergence of every piece of all samples, from last states `[S, T, H]`, of each fork by name."""
    losses: dict[str, list[float]] = {name: [] for name in forks}
    for sample, states in enumerate(unchanged):
        each: dict[str, list[torch.Tensor]] = {name: [] for name in forks}
        for rows in torch.arange(len(states), device=states.device).split(LOGIT_ROWS):
            expected = log_probabilities(states[rows], norm, head)
            for name, changed in forks.items():
                found = log_probabilities(changed[sample, rows], norm, head)
                each[name].append(F.kl_div(found, expected, reduction="none", log_target=True).sum(-1))
        for name, nats in each.items():
            losses[name] += [piece.double().sum().item() for piece in torch.cat(nats).split(PIECE_TOKENS)]
    return losses


def log_probabilities(states: torch.Tensor, norm: Any, head: Any) -> torch.Tensor:
    """Of every next token, `[rows, V]` from `[rows, H]`."""
    with fast_products():
        return head(norm(states)).log_softmax(-1)


def mean_loss(pieces: list[float], length: int) -> tuple[float, float | None]:
    """Nats a token of samples of `length` tokens, and the standard error; `None` where there is one piece."""
    tokens = len(pieces) // math.ceil(length / PIECE_TOKENS) * length
    nats = torch.tensor(pieces, dtype=torch.float64)
    error = nats.std().item() * math.sqrt(len(pieces)) / tokens if len(pieces) > 1 else None
    return nats.sum().item() / tokens, error
