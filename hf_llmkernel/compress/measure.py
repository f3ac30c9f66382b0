"""The measurement of a compressed checkpoint beside the one it came from."""

import logging
from pathlib import Path
from typing import Any

from ..data import load_documents, split_documents, token_windows
from ..evaluate.inventory import inspect
from ..evaluate.machine import available_bytes
from ..evaluate.measure import compare, longest_context, with_baseline
from ..evaluate.report import write_report
from ..evaluate.speed import SpeedSettings
from ..model.configuration_llm_kernel import LLMKernelConfig
from .recipe import CONTEXT, Evaluation

logger = logging.getLogger(__name__)

LOADED_TO_STORED = 3  # a model in memory takes its files, a dense copy of packed weights, and activations


def check_evaluation(evaluation: Evaluation, tokenizer: Any, config: LLMKernelConfig) -> None:
    """Raises `ValueError` where the text is shorter than a window, or the window than the model's positions."""
    context, longest = evaluation.window(config.max_position_embeddings), config.max_position_embeddings
    if context > longest:
        raise ValueError(
            f"evaluation.context={context}: is above the model's max_position_embeddings={longest}; lower it."
        )
    _, documents = split_documents(load_documents(str(evaluation.source)))
    token_windows(tokenizer, documents, context, evaluation.tokens, config.vocab_size)


def measure(
    dense: Path, compressed: Path, evaluation: Evaluation, names: list[str], progress: bool, memory_bytes: int | None
) -> dict[str, Any] | None:
    """Measures both in turns, writes the report into the compressed one's folder, and returns it as a dictionary.

    Perplexities are taken block by block; speed only where both models fit in `memory_bytes`, by default what is
    available. `None` without an evaluation text.
    """
    if evaluation.source is None:
        return None
    context = evaluation.window(longest_context(compressed))
    if evaluation.context is None and context < CONTEXT:
        logger.warning(f"evaluation: on windows of {context} tokens, the model's max_position_embeddings")
    needed = LOADED_TO_STORED * max(inspect(folder).bytes_on_disk or 0 for folder in (dense, compressed))
    memory = available_bytes() if memory_bytes is None else memory_bytes
    reason = f"loading it takes some {needed / 1e9:.1f} GB of memory, allowed are {memory / 1e9:.1f} GB"
    before, after = compare(
        [dense, compressed],
        text=evaluation.source,
        context=context,
        tokens=evaluation.tokens,
        speed=evaluation.speed,
        no_speed_reason=reason if needed > memory else None,
        settings=SpeedSettings(prompt=evaluation.prompt),
        names=names,
        progress=progress,
    )
    report = with_baseline(after, before)
    write_report(report, compressed)
    return report.to_dict()
