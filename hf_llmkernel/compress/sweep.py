"""The sweep: a checkpoint is read block by block, changed by the stages of a recipe, and written at once.

What is in memory is one block, the calibration's hidden states, and while it is needed the embedding. Each block sees
what the compressed blocks before it put out, so that it can make up for them.
"""

import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoint import CheckpointReader, CheckpointWriter, check_disk_space
from ..model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ..model.linear_llm_kernel import build_embedding
from .block import Block, group_by_block, stored_as
from .calibration import Walk, calibration_ids
from .plan import merge_layers, own_layers, plan_recipe
from .recipe import Recipe

SMALL_FILES_BYTES = 64 << 20  # what a tokenizer and the payload take at most


class Sweep:
    """One walk over the blocks of a checkpoint.

    Args:
        source: folder of this family.
        folder: to write the weights into.
        recipe: what to do.
        tokenizer: for calibration.

    Raises:
        ValueError: a damaged checkpoint, or a recipe that does not fit it.
    """

    def __init__(self, source: Path, folder: Path, recipe: Recipe, tokenizer: Any):
        self.recipe = recipe
        self.folder = folder
        self.reader = CheckpointReader(source)
        self.config = LLMKernelConfig.from_pretrained(source)
        self.config._attn_implementation = "sdpa"
        self.outcome = plan_recipe(self.config, recipe)
        self.dtype = getattr(torch, recipe.dtype) if recipe.dtype else self._source_dtype()
        keys = self.reader.keys()
        self.prefix = "model." if any(key.startswith("model.layers.") for key in keys) else ""
        self.blocks, self.others = group_by_block(keys, f"{self.prefix}layers.")
        if stray := sorted(set(self.blocks) - set(range(self.config.num_hidden_layers))):
            raise ValueError(
                f"{self.blocks[stray[0]][0]}: config.json has {self.config.num_hidden_layers} layers only; it and the "
                "weights must be of one checkpoint."
            )
        self.ids = calibration_ids(recipe.calibration, tokenizer, self.config) if recipe.needs_data else None
        self.forward_seconds = 0.0
        self.weight_bytes = 0
        check_disk_space(folder, self._largest_bytes() + SMALL_FILES_BYTES)

    @property
    def calibration_tokens(self) -> int:
        return 0 if self.ids is None else self.ids.numel()

    @torch.no_grad()
    def run(self, progress: bool = True) -> LLMKernelConfig:
        """Writes every tensor and returns the new model's configuration."""
        layers = own_layers(self.config)
        with CheckpointWriter(self.folder) as writer, self._bar(progress) as bar:
            embedding = self._write_top(writer)
            walk = None if self.ids is None else Walk(self.config, self._embed(embedding))
            del embedding
            for index, layer in enumerate(layers):
                block = self._read_block(index, layer)
                self._compress_block(block, walk, bar)
                for name, tensor in block.tensors.items():
                    writer.add(f"{self.prefix}layers.{index}.{name}", tensor)
                bar.update()
        self.weight_bytes = writer.total_bytes
        return self._new_config(layers)

    def _bar(self, progress: bool) -> tqdm:
        return tqdm(total=self.config.num_hidden_layers, desc="compressing", unit="block", disable=not progress)

    def _compress_block(self, block: Block, walk: Walk | None, bar: tqdm) -> None:
        for stage in self.recipe.stages:
            if not stage.covers(block.index):
                continue
            bar.set_postfix_str(stage.name)
            statistics = stage.statistics(block)
            if statistics and walk is not None:
                self._timed(walk.observe, block, statistics)
            stage.apply(block, statistics)
        block.cast(self.dtype)
        if walk is not None and self._needs_data_after(block.index):
            bar.set_postfix_str("forward")
            self._timed(walk.advance, block)

    def _needs_data_after(self, index: int) -> bool:
        later = range(index + 1, self.config.num_hidden_layers)
        return any(stage.needs_data and any(map(stage.covers, later)) for stage in self.recipe.stages)

    def _timed(self, step, *arguments) -> None:
        started = time.monotonic()
        step(*arguments)
        self.forward_seconds += time.monotonic() - started

    def _read_block(self, index: int, layer: LLMKernelConfig) -> Block:
        prefix = f"{self.prefix}layers.{index}."
        names = self.blocks.get(index, [])
        return Block(index, layer, {name.removeprefix(prefix): self.reader.tensor(name) for name in names})

    def _write_top(self, writer: CheckpointWriter) -> dict[str, torch.Tensor]:
        """Writes what belongs to no block; returns the embedding's stored tensors."""
        embedding = {}
        for name in self.others:
            module, _, suffix = name.rpartition(".")
            leaf = module.rpartition(".")[2]
            if leaf == "lm_head" and self.config.tie_word_embeddings:
                continue
            stored = {suffix: stored_as(name, self.reader.tensor(name), self.dtype)}
            if leaf in ("embed_tokens", "lm_head") and suffix == "weight":
                stored = self._apply_top(name, stored)
            for ending, tensor in stored.items():
                writer.add(f"{module}.{ending}", tensor)
            if leaf == "embed_tokens":
                embedding |= stored
        return embedding

    def _apply_top(self, name: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = self.reader.tensor(name)
        for stage in self.recipe.stages:
            changed = stage.apply_top(weight)
            stored = stored if changed is None else changed
        return stored

    def _embed(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """The calibration sequences as hidden states, fp32 `[S, T, H]`, by the embedding as it is stored."""
        config = self._new_config(own_layers(self.config))
        with torch.device("meta"):
            form = LinearForm.from_dict(config.embed_tokens_form)
            embedding = build_embedding(config.vocab_size, config.hidden_size, form)
        embedding.load_state_dict(stored, assign=True)
        return embedding(self.ids).float()

    def _new_config(self, layers: list[LLMKernelConfig]) -> LLMKernelConfig:
        config = copy.deepcopy(self.config)
        config.dtype = self.dtype
        for stage in self.recipe.stages:
            stage.plan_top(config)
        return merge_layers(config, layers)

    def _source_dtype(self) -> torch.dtype:
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        dtypes = map(self.reader.dtype, self.reader.keys())
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    def _largest_bytes(self) -> int:
        """What the weights take at most: as if nothing were removed or packed."""
        values = sum(map(math.prod, map(self.reader.shape, self.reader.keys())))
        return values * self.dtype.itemsize
