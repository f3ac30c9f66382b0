"""The measurement of a compressed checkpoint beside the one it came from."""

from pathlib import Path
from typing import Any

from ..data import load_documents, split_documents, token_windows
from ..evaluate.measure import compare, with_baseline
from ..evaluate.report import write_report
from ..evaluate.speed import SpeedSettings
from ..model.configuration_llm_kernel import LLMKernelConfig
from .recipe import Evaluation


def check_evaluation(evaluation: Evaluation, tokenizer: Any, config: LLMKernelConfig) -> None:
    """Raises `ValueError` where the text is shorter than a window, or the window than the model's positions."""
    if evaluation.context > config.max_position_embeddings:
        raise ValueError(
            f"evaluation.context={evaluation.context}: is above the model's max_position_embeddings="
            f"{config.max_position_embeddings}; lower it."
        )
    _, documents = split_documents(load_documents(str(evaluation.source)))
    token_windows(tokenizer, documents, evaluation.context, evaluation.tokens, config.vocab_size)


def measure(dense: Path, compressed: Path, evaluation: Evaluation, names: list[str], progress: bool) -> dict[str, Any]:
    """Measures both in turns, writes the report into the compressed one's folder, and returns it as a dictionary."""
    before, after = compare(
        [dense, compressed],
        text=evaluation.source,
        context=evaluation.context,
        tokens=evaluation.tokens,
        settings=SpeedSettings(prompt=evaluation.prompt),
        names=names,
        progress=progress,
    )
    report = with_baseline(after, before)
    write_report(report, compressed)
    return report.to_dict()
