"""Which draft makes a model write fastest, by measure: how many of its tokens are accepted, and what steps cost.

Reading order: a draft's measure -> loading one -> the best of several -> measuring one.

Shapes: S tokens of a prompt, T of it and what follows.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch
from transformers import DynamicCache

from ..evaluate.table import size
from ..kernels import library
from ..kernels.step import crop
from .sampling import GREEDY
from .speculative import MOST_DRAFTED, best_count

ROUNDS = 9
WRITTEN = 64  # tokens that are measured on


@dataclass(frozen=True)
class DraftMeasure:
    """What is expected of a draft: its best number of tokens, 0 where none pays, and the speed-up with it."""

    acceptance: float
    draft_seconds: float  # of one token
    step_seconds: float  # of the model, for one token
    drafted: int
    speedup: float

    def __str__(self) -> str:
        share = self.draft_seconds / self.step_seconds
        expected = f"{self.speedup:.2f} times as fast" if self.drafted else "no gain"
        return f"{self.acceptance:.0%} of its tokens accepted, each at {share:.2f} of a step: {expected}"


def load_draft(network: Any, tokenizer: Any, draft: str) -> Any:
    """The model of a folder or Hub id as draft of another.

    Raises:
        ValueError: another vocabulary, or no checkpoint.
        OSError: no such checkpoint.
    """
    from .command import load

    model, own = load(draft)
    check_vocabulary(network, tokenizer, model, own, draft)
    return model


def check_vocabulary(network: Any, tokenizer: Any, draft: Any, own: Any, name: str) -> None:
    """Raises `ValueError` where a draft, with its own tokenizer, has other tokens than the model."""
    if draft.config.vocab_size != network.config.vocab_size or own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"draft={name}: has another vocabulary than the model; take a compressed copy of the model.")


def load_beside(model: str, dtype: str, memory: str, drafts: Sequence[str]) -> tuple[Any, Any, Any]:
    """A model within what memory a draft leaves, its tokenizer, and the draft.

    Raises:
        ValueError: as `load_draft` and `load_within`, several drafts, or one that does not fit.
    """
    from ..convert.command import parse_size
    from .command import load, load_within

    if len(drafts) > 1:
        raise ValueError(f"draft: with memory there is one, not {len(drafts)}; name the one.")
    check_room(drafts[0], parse_size(memory, "memory"))
    loaded, own = load(drafts[0])
    draft: Any = loaded
    draft.generate(torch.zeros(1, 1, dtype=torch.long), max_new_tokens=1, **GREEDY)  # lays out its weights
    network, tokenizer = load_within(model, dtype, memory)
    check_vocabulary(network, tokenizer, draft, own, drafts[0])
    return network, tokenizer, draft


def check_room(draft: str, memory_bytes: int) -> None:
    """Raises `ValueError` where the files of a draft, which stays in memory, are beyond what the process may take."""
    from ..evaluate import inspect
    from ..evaluate.source import model_folder

    needed = inspect(model_folder(draft)).bytes_on_disk or 0
    left = memory_bytes - psutil.Process().memory_info().rss
    if needed > left:
        raise ValueError(
            f"draft={draft}: takes {size(needed)}, memory={size(memory_bytes)} leaves {size(max(left, 0))} beside the "
            "interpreter; allow more, or leave the draft out."
        )


def chosen_draft(network: Any, tokenizer: Any, drafts: Sequence[str], inputs: Mapping[str, torch.Tensor]) -> Any:
    """The one draft there is, or `best_draft` of several, of which a line to standard error says why."""
    if len(drafts) == 1:
        return load_draft(network, tokenizer, drafts[0])
    best, measures = best_draft(network, tokenizer, drafts, inputs)
    name = max(measures, key=lambda name: measures[name].speedup)
    others = ", ".join(f"{other} {measures[other].speedup:.2f}" for other in measures if other != name)
    taken = "draft" if best is not None else "no draft pays, not even"
    print(f"{taken} {name}: {measures[name]} (others: {others})", file=sys.stderr)
    return best


def best_draft(
    network: Any, tokenizer: Any, drafts: Sequence[str], inputs: Mapping[str, torch.Tensor]
) -> tuple[Any, dict[str, DraftMeasure]]:
    """The draft of the highest speed expected, or `None` where none pays, and what was measured of each.

    Args:
        drafts: folders or Hub ids.
        inputs: a prompt, `[1, S]`; what the model writes after it is measured on.

    Raises:
        ValueError, OSError: as `load_draft`.
    """
    options = {"max_new_tokens": WRITTEN, "min_new_tokens": 2 * MOST_DRAFTED, **GREEDY}
    sequence = network.generate(**inputs, **options)
    best, measures = None, {}
    for name in drafts:
        draft = load_draft(network, tokenizer, name)
        measures[name] = measure_draft(network, draft, sequence, inputs["input_ids"].shape[1])
        if measures[name].drafted and measures[name].speedup == max(each.speedup for each in measures.values()):
            best = draft
    return best, measures


@torch.no_grad()
def measure_draft(model: Any, draft: Any, sequence: torch.Tensor, prompt: int) -> DraftMeasure:
    """Measures a draft on a sequence `[1, T]` of greedy decoding, of which the first tokens are the prompt."""
    with library.generating():
        likeliest = draft(sequence.to(draft.device)).logits[0, prompt - 1 : -1].argmax(-1).cpu()
        caches = [_read(each, sequence) for each in (model, draft)]
        rounds = [
            (*(_seconds(model, caches[0], sequence[:, -count:]) for count in (1, 1 + MOST_DRAFTED)),
             _seconds(draft, caches[1], sequence[:, -1:]))
            for _ in range(ROUNDS)
        ]  # fmt: skip
    one, many, drafted = (median(seconds) for seconds in zip(*rounds, strict=True))
    acceptance = (likeliest == sequence[0, prompt:].cpu()).float().mean().item()
    more = max(many - one, 0.0) / MOST_DRAFTED
    return DraftMeasure(acceptance, drafted, one, *best_count(acceptance, drafted, lambda n: one + more * (n - 1)))


def _read(model: Any, sequence: torch.Tensor) -> DynamicCache:
    """A cache of all tokens that no step is timed with."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model(input_ids=sequence[:, : -1 - MOST_DRAFTED].to(model.device), past_key_values=cache, use_cache=True)
    cache.activate_past_recording()
    return cache


def _seconds(model: Any, cache: DynamicCache, tokens: torch.Tensor) -> float:
    started = time.perf_counter()
    model(input_ids=tokens.to(model.device), past_key_values=cache, use_cache=True).logits.argmax(-1).tolist()
    crop(model, cache, tokens.shape[1])
    return time.perf_counter() - started
