"""Token windows of documents: what every perplexity of this project is measured on, and what calibration runs through.

The protocol: each document is tokenized with a blank line (two newlines) after it and without special tokens; the
tokens of all documents follow each other in order and are cut into windows that do not overlap; the rest is dropped.
A conversation is tokenized as the tokenizer's chat template writes it, with the special tokens of the template and
nothing after it.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .documents import Document

SEPARATOR = "\n\n"
# No tokenizer averages more characters a token than this; of a longer document only the beginning is tokenized.
CHARACTERS_PER_TOKEN = 64


def token_windows(
    tokenizer: Any,
    documents: Sequence[Document],
    context: int = 1024,
    tokens: int = 8192,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Windows of the first tokens of the documents.

    Args:
        tokenizer: of transformers.
        documents: in the order in which they are used.
        context: tokens a window, at least 2.
        tokens: tokens asked for; `floor(tokens / context)` windows are made, fewer where the text ends before.
        vocab_size: of the model, to check the tokenizer against.

    Returns:
        int64 `[windows, context]`.

    Raises:
        ValueError: a context below 2 or above `tokens`, a text shorter than one window, a token the model lacks, or a
            conversation that the tokenizer has no template for.
    """
    if context < 2:
        raise ValueError(f"context={context}: a window needs at least 2 tokens; 1024 is the default.")
    if tokens < context:
        raise ValueError(f"tokens={tokens}: is less than one window of context={context}; raise it or lower context.")
    ids = _first_tokens(tokenizer, documents, tokens // context * context)
    if len(ids) < context:
        raise ValueError(
            f"context={context}: the text has {len(ids)} tokens in {len(documents)} documents, less than one window; "
            "lower context or give a longer text."
        )
    return _cut(ids, context, len(ids) // context, vocab_size)


def calibration_batches(
    tokenizer: Any,
    documents: Sequence[Document],
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Sequences of shuffled documents, packed one after the other: no token is used twice, none is padding.

    Args:
        tokenizer: of transformers.
        documents: the calibration side of `split_documents`.
        samples, length: number of sequences and tokens in each.
        seed: of the shuffle.
        vocab_size: of the model, to check the tokenizer against.

    Returns:
        int64 `[samples, length]`.

    Raises:
        ValueError: fewer tokens than `samples * length`, a token the model lacks, or a conversation that the tokenizer
            has no template for.
    """
    if samples < 1 or length < 1:
        raise ValueError(f"samples={samples}, length={length}: both must be at least 1.")
    shuffled = random.Random(seed).sample(documents, len(documents))
    ids = _first_tokens(tokenizer, shuffled, samples * length)
    if len(ids) < samples * length:
        raise ValueError(
            f"samples={samples}, length={length}: need {samples * length} tokens, the text has {len(ids)}; lower "
            "either or give a longer text."
        )
    return _cut(ids, length, samples, vocab_size)


def _first_tokens(tokenizer: Any, documents: Iterable[Document], count: int) -> list[int]:
    """The first `count` tokens, or all where there are fewer; stops reading when it has them."""
    ids: list[int] = []
    for piece in _token_stream(tokenizer, documents, count):
        ids += piece
        if len(ids) >= count:
            break
    return ids[:count]


def _token_stream(tokenizer: Any, documents: Iterable[Document], count: int) -> Iterator[list[int]]:
    longest = CHARACTERS_PER_TOKEN * count
    for document in documents:
        is_text = isinstance(document, str)
        text = document[:longest] + SEPARATOR if is_text else document.render(tokenizer)[:longest]
        # verbose=False: a document longer than the model's context is cut into windows, no cause for a warning.
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _cut(ids: list[int], length: int, count: int, vocab_size: int | None) -> torch.Tensor:
    windows = torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    if vocab_size is not None and (largest := int(windows.max())) >= vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the tokenizer made token {largest}, which the model does not have; use the "
            "model's own tokenizer."
        )
    return windows
