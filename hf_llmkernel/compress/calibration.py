"""Calibration: token sequences from text.

Shapes: S samples, T tokens a sample.
"""

from typing import Any

import torch

from ..data import calibration_batches, load_documents, split_documents
from ..model.configuration_llm_kernel import LLMKernelConfig
from .recipe import Calibration


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
