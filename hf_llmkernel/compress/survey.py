"""The survey: what a stage looks at over all layers before it decides anything.

It runs calibration through the unchanged blocks and notes per layer what the stage asks for; interrupted, it goes on
where it was. Of several processes each has the same numbers, those of all samples.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from .. import processes
from ..checkpoint.model_folder import ModelFolder
from ..model.configuration_llm_kernel import LLMKernelConfig
from .block import Block
from .disk import write_json, write_tensors
from .inputs import InputStatistic
from .plan import own_layers
from .walk import Walk, fast_products, load_block

Observe = Callable[[Block, str, InputStatistic], dict[str, Any]]


class Survey:
    """All layers of a checkpoint, to be looked at.

    Args:
        source: the checkpoint as the stages before have left it.
        ids: calibration tokens `[S, T]`; `None` where the recipe has none.
        dtype: of what will stay floating.
        folder: for what an interrupted survey needs to go on.
        progress: whether to draw a bar.
        origins: of each layer its number in the checkpoint that the recipe began with; by default the same.
    """

    def __init__(
        self,
        source: ModelFolder,
        ids: torch.Tensor | None,
        dtype: torch.dtype,
        folder: Path,
        progress: bool,
        origins: list[int] | None = None,
    ):
        self.source = source
        self.dtype = dtype
        self.config = source.config
        self.ids = ids
        self.folder = folder
        self.progress = progress
        self.origins = origins or [*range(source.config.num_hidden_layers)]

    @property
    def layers(self) -> list[LLMKernelConfig]:
        """Each layer's own configuration."""
        return own_layers(self.config)

    def block(self, index: int) -> Block:
        """One layer with its weights."""
        return load_block(self.source, index, self.origins[index])

    def weigh(self, look: Callable[[Block], dict[str, Any]]) -> list[dict[str, Any]]:
        """What `look` says of each layer from its weights alone."""
        indices = tqdm(range(len(self.layers)), "surveying", disable=not self.progress)
        return [look(self.block(index)) for index in indices]

    def observe(self, needs: Callable[[LLMKernelConfig], dict[str, str]], look: Observe) -> list[dict[str, Any]]:
        """What `look` says of each layer at each site whose inputs `needs` names; entries of types of JSON, merged."""
        walk = self.walk()
        for index in tqdm(range(len(self.layers)), "surveying", unit="block", disable=not self.progress):
            if index < walk.index:
                continue
            block, found = self.block(index), {}

            def visit(site: str, inputs: InputStatistic | None, block=block, found=found) -> None:
                found.update({} if inputs is None else look(block, site, inputs))

            walk.run(block, needs(block.layer), visit, advance=index + 1 < len(self.layers))
            self.note(index, found)
            walk.settle()
        walk.close()
        return self._read()

    def influences(self, unit: str) -> list[dict[str, float]]:
        """Block influence of every part of each layer: of `"layer"`, or of `"attention"` and `"mlp"`."""
        tokens = self.ids.numel() if self.ids is not None else 1
        return self.follow(lambda block: Influence(tokens))

    def follow(self, watcher: "Callable[[Block], Watcher]") -> list[dict[str, Any]]:
        """What a layer's watcher finds in hidden states before and after its parts."""
        walk = self.walk()
        for index in tqdm(range(walk.index, len(self.layers)), "surveying", unit="block", disable=not self.progress):
            block = self.block(index)
            walk.watch = watch = watcher(block)
            walk.run(block, {}, lambda site, inputs: None, advance=True)
            self.note(index, watch.found())
            walk.settle()
        walk.close()
        return self._read()

    def keep(self, tensors: dict[str, torch.Tensor]) -> str:
        """Writes tensors that are a decision for the whole model; returns the file's name, its entry `tensors`."""
        file = self.folder.with_suffix(".safetensors")
        if processes.is_first():
            write_tensors(file, tensors)
        return file.name

    def walk(self) -> Walk:
        """The calibration sequences before the first layer that was not looked at yet."""
        assert self.ids is not None, "a stage that surveys activations says needs_data"
        self.folder.mkdir(parents=True, exist_ok=True)
        walk = Walk(self.config, self.folder, *self.ids.shape)
        done = 0
        while self._file(done).is_file():
            done += 1
        walk.take_up(done, embedder(self.source.embedding, self.ids))
        return walk

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.json"

    def note(self, index: int, found: dict[str, Any]) -> None:
        """Writes what was found in a layer, of types of JSON; the walk goes on behind it then."""
        if processes.is_first():
            write_json(self._file(index), found)

    def _read(self) -> list[dict[str, Any]]:
        return [json.loads(self._file(index).read_text()) for index in range(len(self.layers))]


class Watcher(Protocol):
    """Looks at hidden states in one layer."""

    def __call__(self, part: str, before: torch.Tensor, after: torch.Tensor) -> None:
        """Takes a batch `[n, T, H]` before and after a part, see `Walk.watch`."""

    def found(self) -> dict[str, Any]:
        """What all processes' batches told, of types of JSON."""
        ...


class Influence:
    """Block influence of every part, over `tokens` (Men et al. 2024, ShortGPT, arXiv 2403.03853)."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.parts: dict[str, float] = {}

    def __call__(self, part: str, before: torch.Tensor, after: torch.Tensor) -> None:
        shares = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        self.parts[part] = self.parts.get(part, 0.0) + float((1 - shares).double().sum())

    def found(self) -> dict[str, float]:
        return {part: total / self.tokens for part, total in processes.summed(self.parts).items()}


def embedder(load_embedding: Callable[[], nn.Module], ids: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    """What starts a walk: the embedded tokens of some samples of this process, fp32 `[n, T, H]`."""
    load = functools.cache(load_embedding)  # on first use: a walk that is taken up needs none
    mine = processes.own(ids)

    def embed(begin: int, end: int) -> torch.Tensor:
        with fast_products():
            return load()(mine[begin:end]).float()

    return embed
