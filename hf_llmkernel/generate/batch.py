"""Continuous batching of one model: requests join and leave between two tokens of those that run.

The caches of all that run are one, padded on the left and masked there, so that a token of each is one forward, which
native kernels serve in one call. transformers' own continuous batching has a paged cache, which they do not know.

A prompt is read in pieces, between which those that run get a token each: who runs waits for a piece, not a prompt.

Reading order: what a model can do -> a request chooses its tokens -> the batch reads, decodes, lets go -> caches.

Shapes: B running requests, N key/value heads, S tokens of the longest, T of one, D head_dim, V vocab_size.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DummyLayer, DynamicLayer

PIECE = 128  # tokens of a prompt that are read at once; native kernels read pieces of half that 10 % more slowly


class Sink(Protocol):
    """Where the tokens of a request go. `ended` says that no more are wanted."""

    @property
    def ended(self) -> bool: ...

    def put(self, value: torch.Tensor) -> None:
        """Takes a token `[1]`."""

    def end(self) -> None: ...

    def fail(self, error: Exception) -> None: ...


class Request:
    """Tokens of a prompt, and those that a model adds, chosen as `generate()` chooses them.

    Args:
        ids: the prompt.
        config: `max_new_tokens`, sampling and end tokens; what it leaves open is the model's.
        sink: is given every new token.
        seed: of the sampling; `None` takes one at random.
    """

    def __init__(self, network: Any, ids: Sequence[int], config: GenerationConfig, sink: Sink, seed: int | None = None):
        config, _ = network._prepare_generation_config(config)
        config.pad_token_id = 0  # nothing is padded with it; without one, every request would be warned about
        network._prepare_special_tokens(config, True, device="cpu")
        self.ids = list(ids)
        self.prompt_tokens = len(self.ids)
        self.sink = sink
        self.most: int = config.max_new_tokens
        self.ends = [] if config._eos_token_tensor is None else config._eos_token_tensor.tolist()
        self.samples: bool = config.do_sample
        self.processors = network._get_logits_processor(
            generation_config=config, input_ids_seq_length=self.prompt_tokens, device="cpu"
        )
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)

    def choose(self, logits: torch.Tensor) -> bool:
        """Adds the next token by its logits `[V]`. Returns whether more may follow."""
        scores = logits.to(torch.float32, copy=True).unsqueeze(0)
        if self.processors:
            scores = self.processors(torch.tensor([self.ids]), scores)
        if self.samples:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[0]
        else:
            token = scores.argmax(-1)
        self.ids += token.tolist()
        self.sink.put(token)
        return not (self.is_full() or self.is_ended() or self.sink.ended)

    def is_ended(self) -> bool:
        """Whether the model has ended its text."""
        return len(self.ids) > self.prompt_tokens and self.ids[-1] in self.ends

    def is_full(self) -> bool:
        return len(self.ids) - self.prompt_tokens >= self.most


def fits_batches(network: Any) -> bool:
    """Whether requests can share a cache: all layers keep all tokens, or none."""
    return all(type(layer) in (DynamicLayer, DummyLayer) for layer in DynamicCache(config=network.config).layers)


@dataclass
class Reading:
    """A request whose prompt is being read: the pieces `[1, T]` that are left, and the cache of those before."""

    request: Request
    pieces: deque[torch.Tensor]
    cache: Any
    seen: int = 0


class Batch:
    """Requests of a model: those that wait, one that is read, and those that run, at most `most` together."""

    def __init__(self, network: Any, most: int):
        self.network = network
        self.most = most if fits_batches(network) else 1
        self.waiting: deque[Request] = deque()
        self.reading: Reading | None = None
        self.running: list[Request] = []
        self.cache: Any = None
        self.lengths: list[int] = []  # tokens of each that the cache holds

    def is_busy(self) -> bool:
        return bool(self.waiting or self.reading or self.running)

    @torch.no_grad()
    def step(self) -> None:
        """Reads a piece of a prompt, where there is room for it, then adds a token to each request that runs.

        A fault ends whom it concerns.
        """
        self._keep([not request.sink.ended for request in self.running])
        if self.reading is None and self.waiting and len(self.running) < self.most:
            self._begin(self.waiting.popleft())
        if self.reading is not None:
            self._read(self.reading)
        if self.running:
            try:
                self._decode()
            except Exception as error:
                failed, self.running, self.cache, self.lengths = self.running, [], None, []
                for request in failed:
                    request.sink.fail(error)

    def _begin(self, request: Request) -> None:
        ids = torch.tensor([request.ids])
        # Of one length: a short last piece would be computed as a decoding step, whose rounding is another.
        pieces = ids.tensor_split(-(-ids.shape[1] // PIECE), dim=1)
        self.reading = Reading(request, deque(pieces), DynamicCache(config=self.network.config))

    def _read(self, reading: Reading) -> None:
        request = reading.request
        if request.sink.ended:
            self.reading = None
            request.sink.end()
            return
        try:
            ids = reading.pieces.popleft()
            reading.seen += ids.shape[1]
            logits = self._forward(ids, torch.ones(1, reading.seen, dtype=torch.long), None, reading.cache)
            if not reading.pieces:
                self.reading = None
                self._join(request, reading.cache, logits[0])
        except Exception as error:
            self.reading = None
            request.sink.fail(error)

    def _join(self, request: Request, cache: Any, logits: torch.Tensor) -> None:
        if not request.choose(logits):
            request.sink.end()
            return
        if self.running:
            join(self.cache, cache, max(*self.lengths, request.prompt_tokens))
        else:
            self.cache = cache
        self.running.append(request)
        self.lengths.append(request.prompt_tokens)

    def _decode(self) -> None:
        lengths = torch.tensor(self.lengths).unsqueeze(1)  # [B, 1]
        longest = int(lengths.max())
        mask = (torch.arange(longest + 1) >= longest - lengths).long()
        ids = torch.tensor([request.ids[-1:] for request in self.running])
        logits = self._forward(ids, mask, lengths, self.cache)
        self.lengths = [length + 1 for length in self.lengths]
        self._keep([request.choose(row) for request, row in zip(self.running, logits, strict=True)])

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: Any, cache: Any) -> torch.Tensor:
        """Logits `[B, V]` after the last of the tokens `[B, T]`."""
        output = self.network(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _keep(self, kept: list[bool]) -> None:
        """Ends the requests that are not kept."""
        if all(kept):
            return
        rows = [index for index, wanted in enumerate(kept) if wanted]
        ended = [request for request, wanted in zip(self.running, kept, strict=True) if not wanted]
        self.running = [self.running[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        if rows:
            select(self.cache, rows, max(self.lengths))
        else:
            self.cache = None
        for request in ended:
            request.sink.end()


def join(cache: Any, other: Any, length: int) -> None:
    """Adds the rows of another cache, both padded on the left to a length."""
    for layer, added in zip(cache.layers, other.layers, strict=True):
        if layer.keys is not None:
            layer.keys = torch.cat([_padded(layer.keys, length), _padded(added.keys, length)])
            layer.values = torch.cat([_padded(layer.values, length), _padded(added.values, length)])


def select(cache: Any, rows: list[int], length: int) -> None:
    """Leaves some rows, and of these the last `length` tokens."""
    for layer in cache.layers:
        if layer.keys is not None:
            layer.keys = layer.keys[rows, :, -length:]
            layer.values = layer.values[rows, :, -length:]


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, N, S, D]` with zeros before the first token."""
    return pad(states, (0, 0, length - states.shape[2], 0))
