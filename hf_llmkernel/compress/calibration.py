"""Calibration: token sequences from text, and their hidden states on the way through the blocks.

Shapes: S samples, T tokens a sample, H hidden_size, B samples a batch.
"""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..data import calibration_batches, load_documents, split_documents
from ..model.configuration_llm_kernel import LLMKernelConfig
from ..model.modeling_llm_kernel import LLMKernelRotaryEmbedding
from .block import Block
from .recipe import Calibration
from .statistics import InputStatistic

BATCH_TOKENS = 2048


def calibration_ids(calibration: Calibration, tokenizer: Any, config: LLMKernelConfig) -> torch.Tensor:
    """Token ids int64 `[S, T]` of the calibration side of the text.

    Raises:
        ValueError: a text too short, sequences longer than the model's positions, or a token that it does not have.
    """
    if calibration.length > config.max_position_embeddings:
        raise ValueError(
            f"calibration.length={calibration.length}: is above the model's max_position_embeddings="
            f"{config.max_position_embeddings}; lower it."
        )
    documents, _ = split_documents(load_documents(str(calibration.source)))
    return calibration_batches(
        tokenizer, documents, calibration.samples, calibration.length, calibration.seed, config.vocab_size
    )


class Walk:
    """Hidden states `[S, T, H]` in fp32 that enter the next block; each block's own outputs replace them.

    Args:
        config: of the model, for positions and masks.
        hidden: the embedded calibration sequences.
    """

    def __init__(self, config: LLMKernelConfig, hidden: torch.Tensor):
        self.hidden = hidden
        self._kinds = config.layer_types or []
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        self._position_embeddings = LLMKernelRotaryEmbedding(config)(hidden[:1], positions)
        arguments = {
            "config": config,
            "inputs_embeds": hidden[:1],
            "attention_mask": None,
            "past_key_values": None,
            "position_ids": positions,
        }
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        self._masks = {kind: makers[kind](**arguments) for kind in set(self._kinds)}

    def observe(self, block: Block, statistics: Mapping[str, InputStatistic]) -> None:
        """Fills statistics `{leaf name: statistic}` of the inputs of a block's linears; the states stay where they are.

        Raises:
            ValueError: inputs that are not finite, naming the linear.
        """
        module = block.module()
        for batch in self._batches():
            seen: set[str] = set()
            with ExitStack() as hooks, suppress(AllSeen):
                for leaf, statistic in statistics.items():
                    linear = module.get_submodule(block.linear_path(leaf))
                    hook = _observer(leaf, statistic, seen, len(statistics))
                    hooks.enter_context(linear.register_forward_pre_hook(hook))
                self._forward(module, block.index, batch)
        for leaf, statistic in statistics.items():
            if not statistic.is_finite():
                path = block.path(block.linear_path(leaf))
                raise ValueError(f"{path}: its inputs overflow or are NaN on the calibration text; check the weights.")

    def advance(self, block: Block) -> None:
        """Takes the states through a block. Raises `ValueError` where its outputs are not finite."""
        module = block.module()
        for batch in self._batches():
            batch.copy_(self._forward(module, block.index, batch))
            if not batch.isfinite().all():
                raise ValueError(
                    f"model.layers.{block.index}: its outputs are not finite on the calibration text; check the "
                    "weights."
                )

    def _batches(self) -> tuple[torch.Tensor, ...]:
        return self.hidden.split(max(BATCH_TOKENS // self.hidden.shape[1], 1))

    def _forward(self, module: torch.nn.Module, index: int, batch: torch.Tensor) -> torch.Tensor:
        mask = self._masks[self._kinds[index]]
        return module(batch, attention_mask=mask, position_embeddings=self._position_embeddings)


class AllSeen(Exception):
    """Ends a forward whose outputs nobody waits for, once every statistic has its inputs."""


def _observer(leaf: str, statistic: InputStatistic, seen: set[str], wanted: int):
    def observe(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        statistic.add(inputs[0])
        seen.add(leaf)
        if len(seen) == wanted:
            raise AllSeen

    return observe
