"""The sweep: a checkpoint is read block by block, changed by the stages of one phase, and written at once.

What is in memory is one block and the batch that runs through it; hidden states are on the disk. Each block sees what
the changed ones before it put out, so that it can make up for them. Every finished block is a file of its own: a sweep
that was interrupted, however, goes on behind the last of them and ends with the same bytes.

Reading order: run -> top -> blocks -> one block -> what is on the disk.
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from .. import processes
from ..checkpoint.header import read_header
from ..checkpoint.model_folder import ModelFolder, embedding_module, stored_as
from ..checkpoint.precision import check_products
from ..checkpoint.reader import INDEX_FILE
from ..model.configuration_llm_kernel import LAYER_FIELDS, LinearForm, LLMKernelConfig
from .block import SITES, Block
from .disk import write_json, write_tensors
from .inputs import NEEDS, InputStatistic, changed_inputs
from .plan import merge_layers, own_layers
from .reference import Reference
from .stage import Stage
from .survey import embedder
from .walk import Visit, Walk, load_block

TOP_FILE = "top.safetensors"


@dataclass(frozen=True)
class Step:
    """A stage of a phase and its decision: `targets` has one entry a layer, `None` where it decided nothing.

    `tensors` are a decision for the whole model: the target of every layer, and of what is outside of the layers.
    """

    stage: Stage
    targets: list[Any] | None = None
    tensors: dict[str, torch.Tensor] | None = None

    def target(self, index: int) -> Any:
        if self.tensors is not None:
            return self.tensors
        return None if self.targets is None else self.targets[index]

    def within(self, index: int) -> "list[Step]":
        """What it is in one layer: the stages chosen for it, where it is a choice of others."""
        chosen = self.stage.chosen_stages(self.target(index))
        return [self] if chosen is None else [Step(stage) for stage in chosen]


class Clock:
    """Seconds by what they were spent on; those that an interrupted run saved in `file` count too."""

    def __init__(self, file: Path):
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    def save(self) -> None:
        """Of several processes, the first one's."""
        if processes.is_first():
            write_json(self.file, self.seconds)

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; its time is added under `name`."""
        started = time.monotonic()
        try:
            return work()
        finally:
            self.add(name, time.monotonic() - started)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Sweep:
    """One walk over the blocks of a checkpoint.

    Args:
        source: the checkpoint.
        steps: the phase's stages with what they decided.
        folder: to write into; what an interrupted sweep left there is kept.
        dtype: of what stays floating.
        ids: calibration tokens `[S, T]`, or `None`.
        progress: whether to draw a bar.
        clock: takes the seconds.
        origin: the uncompressed checkpoint, and of each layer of `source` the one of it that it was made of.
        computes: dtype that the finished model computes in; by default `dtype`.
    """

    def __init__(
        self,
        source: ModelFolder,
        steps: list[Step],
        folder: Path,
        dtype: torch.dtype,
        ids: torch.Tensor | None,
        progress: bool,
        clock: Clock,
        origin: tuple[ModelFolder, list[int]],
        computes: torch.dtype | None = None,
    ):
        self.source = source
        self.steps = steps
        self.folder = folder
        self.dtype = dtype
        self.ids = ids if any(step.stage.sweeps_data for step in steps) else None
        self.progress = progress
        self.clock = clock
        self.origin = origin
        self.computes = computes or dtype
        self.count = source.config.num_hidden_layers
        self._told: list[str] = []  # the last block's loss, for the bar

    @torch.no_grad()
    def run(self) -> ModelFolder:
        """Writes every tensor and the configuration; returns the result.

        Raises:
            ValueError: a weight that a form, or the dtype that the model computes in, cannot hold.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if processes.is_first() and not (self.folder / TOP_FILE).is_file():
            self._write_top()
        processes.wait()
        done = self._finished()
        # Without calibration there is nothing to share: the first process does it all.
        if done < self.count and (self.ids is not None or processes.is_first()):
            self._sweep_blocks(done)
        if processes.is_first():
            self._write_config()
        processes.wait()
        return ModelFolder(self.folder)

    def notes(self) -> list[list[dict[str, Any]]]:
        """What stages told of each layer."""
        return [json.loads(self._file(index, "json").read_text())["notes"] for index in range(self.count)]

    # Embedding, last norm and head

    def _write_top(self) -> None:
        tensors = {}
        for name, tensor in self._top().items():
            module, _, suffix = name.rpartition(".")
            leaf = module.rpartition(".")[2]
            stored = {suffix: tensor}
            if leaf in ("embed_tokens", "lm_head") and suffix == "weight":
                stored = self._apply_top(leaf, stored)
            named = {f"{module}.{key}": tensor for key, tensor in stored.items()}
            tensors |= {name: stored_as(name, tensor, self.dtype) for name, tensor in named.items()}
        self._check_top(tensors)
        write_tensors(self.folder / TOP_FILE, tensors)

    def _check_top(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raises `ValueError` where an embedding or head stands for what the model cannot compute."""
        config = self._config([])
        ends = {f"{self.source.prefix}embed_tokens": config.embed_tokens_form, "lm_head": config.lm_head_form}
        for path, form in ends.items():
            names = [name for name in tensors if name.startswith(f"{path}.")]
            stored = {name.removeprefix(f"{path}."): tensors[name] for name in names}
            if stored:
                shape = (config.vocab_size, config.hidden_size)
                check_products(path, LinearForm.from_dict(form), shape, self.computes, stored.__getitem__)

    def _top(self) -> dict[str, torch.Tensor]:
        """All tensors outside of the blocks, as decisions for the whole model change them."""
        tied = self.source.config.tie_word_embeddings
        names = [name for name in self.source.others if not (tied and name.startswith("lm_head."))]
        tensors = {name: self.source.reader.tensor(name) for name in names}
        for step in self.steps:
            if step.tensors is not None:
                tensors = step.stage.change_top(tensors, self.source.config, step.tensors)
        return tensors

    def _apply_top(self, leaf: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for step in self.steps:
            changed = step.stage.apply_top(leaf, stored["weight"].float()) if step.stage.embeddings else None
            if changed is not None:
                return changed  # no stage works on an embedding that is packed already; `plan_top` has said so
        return stored

    def _embedding(self) -> nn.Module:
        """The token embedding as it is now stored."""
        config = self._config([])
        path = f"{self.source.prefix}embed_tokens."
        tensors = load_file(self.folder / TOP_FILE)
        stored = {name.removeprefix(path): tensor for name, tensor in tensors.items() if name.startswith(path)}
        return embedding_module(config, LinearForm.from_dict(config.embed_tokens_form), stored)

    # Blocks

    def _sweep_blocks(self, done: int) -> None:
        walk = None
        if self.ids is not None:
            walk = Walk(self.source.config, self.folder, *self.ids.shape)
            walk.take_up(done, embedder(self._embedding, self.ids))
            done = walk.index
        if done and self.progress:
            print(f"going on from block {done + 1} of {self.count}", file=sys.stderr)
        reference = self._reference(walk)
        with tqdm(total=self.count, initial=done, desc="compressing", unit="block", disable=not self.progress) as bar:
            for index in range(done, self.count):
                block = self.clock.time("read", lambda index=index: self._read_block(index))
                if reference is not None:
                    self.clock.time("reference", lambda block=block: reference.compute(block))
                self._change(block, walk, bar)
                self.clock.time("write", lambda block=block: self._write_block(block))
                for passed in (walk, reference):
                    if passed is not None:
                        passed.settle()
                self.clock.save()
                bar.update()
        for passed in (walk, reference):
            if passed is not None:
                passed.close()

    def _reference(self, walk: Walk | None) -> Reference | None:
        """The uncompressed model's walk beside this one, where a stage asks for targets."""
        if walk is None or self.ids is None or not any(step.stage.needs_reference for step in self.steps):
            return None
        source, layers = self.origin
        if source.config.hidden_size != self.source.config.hidden_size:
            raise ValueError("refit: hidden states have another width than the source's; refit before prune_hidden.")
        reference = Reference(source, layers, self.folder / "reference", *self.ids.shape)
        reference.take_up(walk.index, embedder(source.embedding, self.ids))
        walk.target = reference.target
        return reference

    def _read_block(self, index: int) -> Block:
        return load_block(self.source, index, self.origin[1][index])

    def _change(self, block: Block, walk: Walk | None, bar: tqdm) -> None:
        """All stages on one block, one run of the walk for those that can share it."""
        covering = self._steps_of(block.index)
        for step in covering:
            step.stage.begin(block, step.target(block.index))
        runs = [list(steps) for _, steps in groupby(covering, lambda step: step.stage.structural)] or [[]]
        for number, steps in enumerate(runs):
            last = number == len(runs) - 1
            names = [step.stage.name for step in steps]
            bar.set_postfix_str(" ".join([*names, *self._told]))
            needs = shared_needs(steps, block)
            advance = walk is not None and last and self._needs_data_after(block.index)
            visit = self._visitor(block, steps, last)
            if walk is not None and (needs or advance):
                self._run(walk, block, needs, visit, advance)
                self._told = _loss_text(block)
                bar.set_postfix_str(" ".join([*names, *self._told]))
            else:
                for site in SITES:
                    visit(site, None)
        block.cast(self.dtype)
        block.check_products(self.computes)

    def _run(self, walk: Walk, block: Block, needs: dict[str, str], visit: Visit, advance: bool) -> None:
        """A run of the walk; what is not spent on statistics and in `visit` is the forward's."""
        seconds, started, gathered = self.clock.seconds, time.monotonic(), walk.statistic_seconds
        solved = seconds.get("solve", 0.0)
        walk.run(block, needs, visit, advance)
        statistics = walk.statistic_seconds - gathered
        self.clock.add("statistics", statistics)
        self.clock.add("forward", time.monotonic() - started - statistics - (seconds.get("solve", 0.0) - solved))

    def _visitor(self, block: Block, steps: list[Step], last: bool) -> Visit:
        """What happens at a site: every stage in turn; then its linears are rounded to what will be stored."""

        def visit(site: str, inputs: InputStatistic | None) -> torch.Tensor | None:
            changed = None
            for step in steps:
                change = step.stage.apply(block, site, inputs, step.target(block.index))
                if change is not None:  # stages of one run all remove inputs, or all scale them
                    changed = change if changed is None else changed_inputs(changed, change)
                    inputs = None if inputs is None else inputs.after(change)
            if last:
                block.cast(self.dtype, SITES[site])
            return changed

        return lambda site, inputs: self.clock.time("solve", lambda: visit(site, inputs))

    def _needs_data_after(self, index: int) -> bool:
        later = range(index + 1, self.count)
        return any(step.stage.needs_data for layer in later for step in self._steps_of(layer))

    def _steps_of(self, index: int) -> list[Step]:
        covering = [step for step in self.steps if step.stage.covers(index)]
        return [part for step in covering for part in step.within(index)]

    # What is on the disk

    def _finished(self) -> int:
        done = 0
        while self._file(done, "json").is_file() and done < self.count:
            done += 1
        return done

    def _file(self, index: int, ending: str) -> Path:
        return self.folder / f"layer-{index:05d}.{ending}"

    def _write_block(self, block: Block) -> None:
        """The weights, then the small file that says that they are whole."""
        if not processes.is_first():
            return
        prefix = f"{self.source.prefix}layers.{block.index}."
        write_tensors(
            self._file(block.index, "safetensors"), {prefix + name: tensor for name, tensor in block.tensors.items()}
        )
        fields = {name: getattr(block.layer, name) for name in LAYER_FIELDS}
        write_json(self._file(block.index, "json"), {"layer": fields, "notes": block.notes})

    def _write_config(self) -> None:
        layers = own_layers(self.source.config)
        for index, layer in enumerate(layers):
            for name, value in json.loads(self._file(index, "json").read_text())["layer"].items():
                setattr(layer, name, value)
        self._config(layers).save_pretrained(self.folder)
        files = [self.folder / TOP_FILE, *(self._file(index, "safetensors") for index in range(self.count))]
        weight_map = {key: path.name for path in files for key in read_header(path)}
        write_json(self.folder / INDEX_FILE, {"weight_map": weight_map})

    def _config(self, layers: list[LLMKernelConfig]) -> LLMKernelConfig:
        config = copy.deepcopy(self.source.config)
        config.dtype = self.dtype
        for step in self.steps:
            step.stage.plan_top(config)
        return merge_layers(config, layers) if layers else config


def shared_needs(steps: list[Step], block: Block) -> dict[str, str]:
    """What a run of the walk must know at each site for all of its stages."""
    needs: dict[str, str] = {}
    for step in steps:
        for site, need in step.stage.needs(block.layer).items():
            needs[site] = max(need, needs.get(site, NEEDS[0]), key=NEEDS.index)
    return needs


def _loss_text(block: Block) -> list[str]:
    """The mean loss of a block's matrices, where its stages noted any."""
    losses = [note["loss"] for note in block.notes if "loss" in note]
    return [f"loss {sum(losses) / len(losses):.2g}"] if losses else []
