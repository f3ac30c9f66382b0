"""Models measured into reports: inventory, speed and memory in turns, perplexity on the same windows.

Reading order: `evaluate` (one model) -> `compare` (several) -> inventory -> windows -> speed -> perplexity.
"""

import gc
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import load_documents, split_documents, token_windows
from ..data.documents import Document
from .inventory import inspect
from .layout import FAMILY
from .machine import describe_machine, describe_versions
from .quality import Perplexity, perplexity, streamed_perplexity
from .report import Report
from .source import model_folder, model_titles, read_config
from .speed import Speed, SpeedSettings, measure_speed


def evaluate(
    model: Any,
    text: str | Path | None = "bbc",
    context: int = 1024,
    tokens: int = 8192,
    baseline: Any = None,
    dtype: str = "auto",
    speed: bool = True,
    *,
    tokenizer: Any = None,
    evaluation_share: float = 0.1,
    seed: int = 0,
    trust_remote_code: bool = False,
    settings: SpeedSettings | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Report:
    """Measures one model, and what it is compared with.

    Args:
        model: folder, Hub name, or a model in memory (it is saved to a temporary folder first).
        text: source of `load_documents`; `None` measures no perplexity.
        context, tokens: of the windows, see `token_windows`.
        baseline: another model, measured on the same windows and in turns with this one; or its `Report`.
        dtype: of speed and memory, see `choose_dtype`; perplexity is always in fp32.
        speed: whether to measure speed and memory and make a sample.
        tokenizer: of a model in memory; a folder has its own.
        evaluation_share, seed: of `split_documents`; the evaluation side is used. 1 takes the whole text.
        trust_remote_code: whether to run code that comes with a checkpoint.
        settings: of the speed measurement.
        name: of the model in the report; by default its folder's.
        progress: whether to draw bars on stderr.

    Raises:
        ValueError: a damaged or unsupported model, a text too short, values that are not finite.
    """
    models, names = [model], [name]
    if baseline is not None and not isinstance(baseline, Report):
        models, names = [baseline, model], [None, name]
    reports = compare(
        models,
        text,
        context,
        tokens,
        dtype,
        speed,
        tokenizer=tokenizer,
        evaluation_share=evaluation_share,
        seed=seed,
        trust_remote_code=trust_remote_code,
        settings=settings,
        names=names,
        progress=progress,
    )
    reference = baseline if isinstance(baseline, Report) else reports[0] if len(reports) == 2 else None
    return reports[-1] if reference is None else with_baseline(reports[-1], reference)


def compare(
    models: Sequence[Any],
    text: str | Path | None = "bbc",
    context: int = 1024,
    tokens: int = 8192,
    dtype: str = "auto",
    speed: bool = True,
    *,
    tokenizer: Any = None,
    evaluation_share: float = 0.1,
    seed: int = 0,
    trust_remote_code: bool = False,
    settings: SpeedSettings | None = None,
    names: Sequence[str | None] | None = None,
    no_speed_reason: str | None = None,
    progress: bool = True,
) -> list[Report]:
    """Measures several models alike, see `evaluate`; one report each, in their order, without baselines.

    `no_speed_reason` says why no model may be loaded whole; speed is not measured then.
    """
    settings = replace(settings or SpeedSettings(), trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="llmkernel-") as scratch:
        folders = [_folder_of(model, tokenizer, Path(scratch) / str(index)) for index, model in enumerate(models)]
        given = names or [None] * len(models)
        titles = [name or title for name, title in zip(given, model_titles(models), strict=True)]
        reports = [_inventory_report(folder, title) for folder, title in zip(folders, titles, strict=True)]
        protocol = Protocol(str(text), context, tokens, evaluation_share, seed, trust_remote_code)
        # What ends early comes first: a text too short, then a model that a plain program cannot load.
        windows = []
        if text is not None:
            documents = load_documents(protocol.text)
            if len(documents) == 1 and evaluation_share < 1:
                protocol = replace(protocol, evaluation_share=0.5)  # see `split_documents`
            windows = _all_windows(folders, documents, protocol)
        no_speed_reason = no_speed_reason if speed else "speed was not asked for"
        if no_speed_reason is None:
            reports = _add_speeds(reports, folders, dtype, settings, progress)
        else:
            reports = [_without(report, SPEED, no_speed_reason) for report in reports]
        if text is None:
            return [_without(report, QUALITY, "no evaluation text was given") for report in reports]
        return _add_perplexities(reports, folders, windows, protocol, progress)


QUALITY = ("perplexity",)
SPEED = ("decode_tokens_per_second", "prefill_tokens_per_second", "peak_memory_bytes", "sample")


@dataclass(frozen=True)
class Protocol:
    """What perplexities are measured on: see `evaluate`."""

    text: str
    context: int
    tokens: int
    evaluation_share: float
    seed: int
    trust_remote_code: bool


def with_baseline(report: Report, baseline: Report) -> Report:
    """The report with another as its baseline, and the ratio of both perplexities where their windows are the same."""
    report = replace(report, baseline=replace(baseline, baseline=None))
    if report.perplexity is None or baseline.perplexity is None:
        return report
    if report.windows_digest != baseline.windows_digest:
        reason = "the baseline has other windows (its tokenizer or text is another)"
        return replace(report, reasons={**report.reasons, "baseline_perplexity": reason})
    each = torch.tensor(report.window_nlls, dtype=torch.float64)
    differences = each - torch.tensor(baseline.window_nlls, dtype=torch.float64)
    ratio = report.perplexity / baseline.perplexity
    error = ratio * differences.std().item() / len(differences) ** 0.5 if len(differences) > 1 else None
    return replace(
        report,
        baseline_perplexity=baseline.perplexity,
        perplexity_ratio=ratio,
        perplexity_ratio_standard_error=error,
    )


def _folder_of(model: Any, tokenizer: Any, scratch: Path) -> Path:
    if not isinstance(model, nn.Module):
        return model_folder(model)
    scratch = scratch / type(model).__name__
    model.save_pretrained(scratch)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch)
    return scratch


def _text_title(text: str | Path) -> str:
    path = Path(text).expanduser()
    return path.name if path.exists() else str(text)


def _inventory_report(folder: Path, title: str) -> Report:
    inventory = inspect(folder)
    return Report(
        model=title,
        parameters=inventory.parameters,
        dense_parameters=inventory.dense_parameters,
        bytes_on_disk=inventory.bytes_on_disk or 0,
        machine=describe_machine(),
        versions=describe_versions(),
    )


def _without(report: Report, names: Sequence[str], reason: str) -> Report:
    return replace(report, reasons={**report.reasons, **dict.fromkeys(names, reason)})


def _all_windows(
    folders: Sequence[Path], documents: list[Document], protocol: Protocol
) -> list[torch.Tensor]:
    withheld = split_documents(documents, protocol.evaluation_share, protocol.seed)[1]
    return [_windows(folder, withheld, protocol) for folder in folders]


def _add_perplexities(
    reports: Sequence[Report],
    folders: Sequence[Path],
    windows: Sequence[torch.Tensor],
    protocol: Protocol,
    progress: bool,
) -> list[Report]:
    measured = []
    for report, folder, ids in zip(reports, folders, windows, strict=True):
        label = f"perplexity of {report.model}"
        if read_config(folder).get("model_type") == FAMILY:
            result = streamed_perplexity(folder, ids, progress=progress, label=label)
        else:
            with _loaded(folder, protocol.trust_remote_code) as model:
                result = perplexity(model, ids, progress=progress, label=label)
        measured.append(_with_perplexity(report, result, ids, protocol))
    return measured


def _windows(folder: Path, documents: list[Document], protocol: Protocol) -> torch.Tensor:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=protocol.trust_remote_code)
    except Exception as error:  # whatever the library raises, there is no tokenizer
        raise ValueError(
            f"{folder}: no tokenizer loads from it ({' '.join(str(error).split())[:200]}); copy the tokenizer's files "
            "into it, or measure no perplexity."
        ) from error
    return token_windows(
        tokenizer, documents, protocol.context, protocol.tokens, read_config(folder).get("vocab_size")
    )


@contextmanager
def _loaded(folder: Path, trust_remote_code: bool) -> Iterator[Any]:
    """The model in fp32, its memory free again afterwards."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: transformers loads no causal model from it ({reason[:300]}).") from error
    model, loading = loaded
    del loaded
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{missing[0]}: missing in {folder} ({len(missing)} such tensors), it would be random; give a checkpoint "
            "of a causal model, with all of its files."
        )
    try:
        yield model
    finally:
        del model
        gc.collect()


def _with_perplexity(report: Report, measured: Perplexity, windows: torch.Tensor, protocol: Protocol) -> Report:
    return replace(
        report,
        perplexity=measured.perplexity,
        perplexity_standard_error=measured.standard_error,
        context_length=measured.context,
        tokens_evaluated=measured.tokens,
        windows=measured.windows,
        windows_digest=hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()[:16],
        window_nlls=list(measured.window_nlls),
        text=_text_title(protocol.text),
        evaluation_share=protocol.evaluation_share,
        seed=protocol.seed,
    )


def _add_speeds(
    reports: Sequence[Report], folders: Sequence[Path], dtype: str, settings: SpeedSettings, progress: bool
) -> list[Report]:
    settings = fit_settings(settings, min(longest_context(folder) for folder in folders))
    speeds = measure_speed(folders, dtype, settings, [report.model for report in reports], progress)
    return [_with_speed(report, speed, settings) for report, speed in zip(reports, speeds, strict=True)]


def longest_context(folder: Path) -> int:
    return int(read_config(folder).get("max_position_embeddings") or 2**31)


def fit_settings(settings: SpeedSettings, longest: int) -> SpeedSettings:
    """The settings with lengths that a model of `longest` positions can run."""
    prompt = min(settings.prompt_tokens, max(longest // 2, 1))
    return replace(
        settings,
        prefill_tokens=min(settings.prefill_tokens, longest),
        prompt_tokens=prompt,
        new_tokens=max(min(settings.new_tokens, longest - prompt), 2),
    )


def _with_speed(report: Report, speed: Speed, settings: SpeedSettings) -> Report:
    reasons = {**report.reasons, **({} if speed.sample_reason is None else {"sample": speed.sample_reason})}
    prefill, decode = speed.rate(settings.prefill), speed.rate(settings.decode)
    return replace(
        report,
        dtype=speed.dtype,
        decode_tokens_per_second=decode.median,
        decode_spread=asdict(decode),
        prefill_tokens_per_second=prefill.median,
        prefill_spread=asdict(prefill),
        peak_memory_bytes=speed.peak_memory_bytes,
        library_memory_bytes=speed.library_memory_bytes,
        load_seconds=speed.load_seconds,
        sample=speed.sample,
        settings=asdict(settings),
        reasons=reasons,
    )
