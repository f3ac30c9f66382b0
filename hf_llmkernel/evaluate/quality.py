"""Perplexity of a causal model on windows of tokens: the protocol of every report.

Windows do not overlap and share no state; in each, every token but the first is predicted from those before it in the
window; the losses are log-softmax in fp32, summed in fp64 over all windows. The model computes in its own dtype: load
it in fp32 for a figure that is to be compared. Native kernels are off, for they round activations to integers.

Shapes: W windows, B windows a batch, T context, D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from ..checkpoint.model_folder import ModelFolder, Positions
from ..kernels import disabled

LOGIT_ROWS = 256  # rows of logits that exist at once: 256 x 49,152 in fp32 are 48 MiB
PROBE_TOKENS = 8


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Args:
        perplexity: `exp(nll)`.
        nll: mean negative log-likelihood of a predicted token, in nats.
        tokens: tokens in the windows; `tokens - windows` of them were predicted.
        windows, context: number and length of the windows.
        standard_error: of the perplexity, from the spread between windows; `None` for a single one.
        window_nlls: mean nll of each window, to compare two models window by window.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    context: int
    standard_error: float | None
    window_nlls: tuple[float, ...]


@disabled()
def perplexity(
    model: Any, windows: torch.Tensor, batch_size: int = 1, progress: bool = True, label: str = "perplexity"
) -> Perplexity:
    """Measures a causal model's perplexity.

    Args:
        model: a causal model of transformers.
        windows: int64 `[W, T]`, as `token_windows` makes them.
        batch_size: windows that run together; does not change the result beyond rounding.
        progress: whether to draw a bar on stderr, called `label`.

    Raises:
        ValueError: windows of another shape or longer than the model's positions, or logits that are not finite.
    """
    _check_windows(model, windows, batch_size)
    with _evaluation_mode(model), torch.inference_mode():
        head = _separate_head(model, windows[:1, :PROBE_TOKENS].to(model.device))
        nlls: list[float] = []
        with tqdm(total=len(windows), desc=label, unit="window", disable=not progress) as bar:
            for batch in windows.split(batch_size):
                nlls += _window_nlls(model, head, batch.to(model.device), first=len(nlls))
                bar.update(len(batch))
    return _summarize(nlls, windows)


@disabled()
@torch.inference_mode()
def streamed_perplexity(
    folder: Path, windows: torch.Tensor, progress: bool = True, label: str = "perplexity"
) -> Perplexity:
    """The same of a checkpoint of this family, one block in memory at a time.

    Args:
        folder: of the checkpoint.
        windows: int64 `[W, T]`.
        progress, label: as in `perplexity`.

    Raises:
        ValueError: a damaged checkpoint, one without a head, or logits that are not finite.
    """
    source = ModelFolder(folder)
    positions = Positions(source.config, windows.shape[1])
    hidden = source.embedding()(windows)  # [W, T, H]
    for index in tqdm(range(source.config.num_hidden_layers), label, unit="block", disable=not progress):
        block, given = source.block(index), positions.arguments(index)
        for states in hidden.split(1):
            states.copy_(block(states, **given))
    norm, head = source.norm(), source.head()
    nlls = []
    for number, (states, tokens) in enumerate(zip(hidden, windows, strict=True)):
        total = summed_nll(norm(states), tokens, head)
        if not math.isfinite(total):
            raise ValueError(f"perplexity={total}: the logits of window {number} are not finite; check the weights.")
        nlls.append(total / (len(tokens) - 1))
    return _summarize(nlls, windows)


def summed_nll(states: torch.Tensor, tokens: torch.Tensor, head: Any) -> float:
    """Sum of the nlls of a window's tokens `[T]` but the first; `head` makes logits of states, `None` if they are.

    Args:
        states: `[T, D]`, or logits `[T, V]`.
    """
    total = 0.0
    for begin in range(0, len(tokens) - 1, LOGIT_ROWS):
        targets = tokens[begin + 1 : begin + 1 + LOGIT_ROWS]  # [r]
        logits = states[begin : begin + len(targets)]
        logits = logits if head is None else head(logits)  # [r, V]
        total += F.cross_entropy(logits.float(), targets, reduction="none").double().sum().item()
    return total


def _check_windows(model: Any, windows: torch.Tensor, batch_size: int) -> None:
    if windows.dim() != 2 or not len(windows) or windows.shape[1] < 2:
        raise ValueError(f"windows={list(windows.shape)}: must be [windows, context], context at least 2.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1.")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and windows.shape[1] > longest:
        raise ValueError(
            f"context={windows.shape[1]}: is above the model's max_position_embeddings={longest}; lower it."
        )


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _separate_head(model: Any, ids: torch.Tensor) -> Any:
    """The output head, where body and head alone give the model's logits; else `None`.

    Rows of logits can then be made a few at a time. Families that do more to their logits (scale or cap them) show on
    a few tokens, `ids` `[1, t]`, and go through their own forward whole.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    expected = model(input_ids=ids, use_cache=False).logits
    apart = head(hidden)
    same = apart.shape == expected.shape and torch.allclose(apart, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    return head if same else None


def _window_nlls(model: Any, head: Any, ids: torch.Tensor, first: int) -> list[float]:
    """Mean nll of each window of a batch `[B, T]`; `first` is the first one's number, for the error message."""
    if head is None:
        rows = model(input_ids=ids, use_cache=False).logits  # [B, T, V]
    else:
        rows = model.base_model(input_ids=ids, use_cache=False)[0]  # [B, T, D]
    nlls = []
    for index, (states, tokens) in enumerate(zip(rows, ids, strict=True)):
        total = summed_nll(states, tokens, head)
        if not math.isfinite(total):
            window = first + index
            raise ValueError(f"perplexity={total}: the logits of window {window} are not finite; {_blame(model)}")
        nlls.append(total / (len(tokens) - 1))
    return nlls


def _blame(model: Any) -> str:
    """Which weights are not finite, as the end of an error message."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and (count := int((~tensor.isfinite()).sum())):
            return f"{name} holds {count} values that are not finite: use another checkpoint."
    return "all weights are finite: the activations overflow, load the model with dtype=float32."


def _summarize(nlls: list[float], windows: torch.Tensor) -> Perplexity:
    each = torch.tensor(nlls, dtype=torch.float64)
    nll = each.mean().item()
    if nll > math.log(torch.finfo(torch.float64).max):
        raise ValueError(f"perplexity=inf: the mean loss is {nll:.0f} nats a token; the model is broken.")
    value = math.exp(nll)
    error = value * each.std().item() / math.sqrt(len(nlls)) if len(nlls) > 1 else None
    return Perplexity(value, nll, windows.numel(), len(nlls), windows.shape[1], error, tuple(nlls))
