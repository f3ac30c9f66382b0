"""Speculative decoding: a draft, as a compressed copy of the model, writes some tokens ahead, and one step checks them.

    model.generate(**inputs, assistant_model=draft)

writes what `model.generate(**inputs)` writes, token for token: a native step gives tokens that are checked together the
logits, to the bit, that they would have got one by one. transformers' own loop behind this option calls `generate` for
every draft; this one decides by what it measures how many tokens to draft, none where that does not pay. It serves
greedy decoding of one sequence; all else is transformers'.

Source: Leviathan, Kalman and Matias 2023, "Fast Inference from Transformers via Speculative Decoding", arXiv
2211.17192.

Reading order: `assisted_decoding` -> what this loop serves -> what is written -> the draft -> how many tokens to draft.

Shapes: S tokens of the sequence, K drafted tokens, V vocab_size.
"""

import time
from bisect import bisect
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from math import inf, prod
from statistics import fmean, linear_regression, median
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, EosTokenCriteria, MaxLengthCriteria
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..kernels.step import crop

MOST_DRAFTED = 7  # with the token before them what a native step takes to the bit as tokens one by one
FIRST_DRAFTED = 3
ONE_MORE = 0.06  # of a step's cost, for every token more, until that is measured
RECENT = 9  # measurements of a cost, of which the median counts
CONFIDENCES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.97)  # of the draft, between bands of as many tokens accepted
STEPS = 12  # with a draft, after which they must have paid
PLAIN_EVERY = 32  # steps
MEMORY = 64  # drafted tokens whose acceptance counts
FIRST_PAUSE, LONGEST_PAUSE = 16, 512  # tokens without a draft, until it is looked at again
OWN = ("past_key_values", "position_ids", "use_cache", "logits_to_keep", "inputs_tensor", "tokenizer")
KINDS = ("prompt_lookup_num_tokens", "use_mtp", "speculation_type", "assistant_early_exit", "assistant_ensemble_weight")
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

_paces: WeakKeyDictionary[Any, WeakKeyDictionary[Any, "Pace"]] = WeakKeyDictionary()  # of a draft, by the model
_drafts: WeakKeyDictionary[Cache, "Draft"] = WeakKeyDictionary()  # by the model's cache, which a conversation keeps


def assisted_decoding(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    assistant_model: Any = None,
    **options: Any,
) -> Any:
    """What `GenerationMixin._assisted_decoding` returns; `None` where transformers' own loop has to serve."""
    if assistant_model is None or not _serves(input_ids, generation_config, options):
        return None
    cache = options["past_key_values"]
    inputs = {name: value for name, value in options.items() if name in OWN[:4]}
    logits = model._prefill(input_ids, generation_config, inputs).logits[:, -1:]
    cache.activate_past_recording()
    written = Written(input_ids, logits_processor, stopping_criteria, streamer)
    written.take(logits, [])
    pace = _paces.setdefault(assistant_model, WeakKeyDictionary()).setdefault(model, Pace())
    draft = _drafts.get(cache)
    if draft is None or draft.model is not assistant_model:
        draft = _drafts[cache] = Draft(assistant_model)
    draft.begin(written)
    _decode(model, cache, written, draft, pace)
    if streamer is not None:
        streamer.end()
    sequences = written.ids().clone()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)  # type: ignore[arg-type]
    return sequences


def _decode(model: Any, cache: Cache, written: "Written", draft: "Draft", pace: "Pace") -> None:
    """Drafts and checks until the end; the cache is left with all tokens but the last, as by `generate`."""
    while not written.ended:
        count = min(pace.wanted(lambda: draft.catch_up(written)), written.room() - 1)
        if count and written.length - draft.read() > 2:
            draft.catch_up(written)
        started = time.perf_counter()
        drafted, confidences = draft.propose(written, count, pace)
        proposed = time.perf_counter()
        tokens = torch.tensor([[written.last(), *drafted]], device=model.device)
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, return_dict=True).logits
        before = written.length
        accepted = written.take(logits, drafted)
        added = written.length - before
        crop(model, cache, 1 + len(drafted) - added)
        draft.keep(written.length - 1)
        pace.measure(confidences, added, accepted, proposed - started, time.perf_counter() - proposed)


# ---- what this loop serves ----


def _serves(input_ids: torch.Tensor, config: Any, options: dict[str, Any]) -> bool:
    cache: Any = options.get("past_key_values")
    length = input_ids.shape[1]
    if input_ids.shape[0] != 1 or config.do_sample or any(getattr(config, name) for name in KINDS):
        return False
    if config.return_dict_in_generate and any(getattr(config, name) for name in OUTPUTS):
        return False
    if type(cache) not in (DynamicCache, Cache) or cache.offloading or not options.get("use_cache"):
        return False
    # All tokens are there and none is masked: `generate` has dropped a mask of ones.
    foreign = [value for name, value in options.items() if name not in OWN]
    if any(value is not None and value is not False for value in foreign) or config._mask_length != length:
        return False
    positions = options.get("position_ids")
    return positions is None or positions[0].tolist() == list(range(length))[-positions.shape[1] :]


# ---- what is written ----


class Written:
    """The sequence so far, `[1, S]`, and whether it has ended.

    Args:
        input_ids: the prompt, `[1, S]`.
        processors, criteria: of `generate`; each is asked of every token once, in their order, as without a draft.
        streamer: is given the tokens one by one, or `None`.
    """

    def __init__(self, input_ids: torch.Tensor, processors: Any, criteria: Any, streamer: Any):
        self.prompt = self.length = input_ids.shape[1]
        self.most = criteria.max_length
        self.processors, self.streamer = processors, streamer
        ends = [criterion for criterion in criteria if type(criterion) is EosTokenCriteria]
        self.eos = {token for criterion in ends for token in criterion.eos_token_id.tolist()}
        self.criteria = [each for each in criteria if type(each) not in (EosTokenCriteria, MaxLengthCriteria)]
        self.ended = False
        self._ids = torch.cat([input_ids, input_ids.new_zeros(1, self.most - self.length)], dim=1)

    def ids(self) -> torch.Tensor:
        return self._ids[:, : self.length]

    def last(self) -> int:
        return int(self._ids[0, self.length - 1])

    def room(self) -> int:
        return self.most - self.length

    def take(self, logits: torch.Tensor, drafted: Sequence[int]) -> int:
        """Adds tokens by logits `[1, K + 1, V]`, as long as the drafted ones are these; returns how many were."""
        likeliest = None if self.processors else logits[0].argmax(-1).tolist()
        for index in range(len(drafted) + 1):
            token = self._processed(logits[:, index]) if likeliest is None else likeliest[index]
            self._add(token)
            if index == len(drafted) or token != drafted[index]:
                return index
            if self.ended:
                return index + 1
        raise AssertionError("the last of the logits is of no drafted token")

    def _processed(self, logits: torch.Tensor) -> int:
        scores = logits.to(copy=True, dtype=torch.float32, device=self._ids.device)
        return int(self.processors(self.ids(), scores).argmax(-1))

    def _add(self, token: int) -> None:
        self._ids[0, self.length] = token
        self.length += 1
        if self.streamer is not None:
            self.streamer.put(self._ids[0, self.length - 1 : self.length].cpu())
        self.ended = self.length >= self.most or token in self.eos
        for criterion in self.criteria:  # all of them: some count
            self.ended |= bool(criterion(self.ids(), None).any())


# ---- the draft ----


class Draft:
    """A draft model and the cache of what it has read of the sequence."""

    def __init__(self, model: Any):
        self.model = model
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.cache.activate_past_recording()
        self.tokens: list[int] = []  # in the cache
        self.keeps = model._supports_logits_to_keep()
        self.context = getattr(model.config, "max_position_embeddings", None)

    def read(self) -> int:
        """How many tokens it has read."""
        return len(self.tokens)

    def begin(self, written: Written) -> None:
        """Keeps of what it has read what the sequence begins with, but for the last token."""
        pairs = enumerate(zip(self.tokens, written.ids()[0].tolist(), strict=False))
        same = next((index for index, (read, token) in pairs if read != token), self.read())
        self.keep(min(same, written.length - 1))

    def propose(self, written: Written, count: int, pace: "Pace") -> tuple[list[int], list[float]]:
        """Likeliest tokens after the sequence and their probabilities: at most `count`, as long as one more pays."""
        if self.context is not None:
            count = min(count, self.context - written.length)
        drafted: list[int] = []
        confidences: list[float] = []
        while len(drafted) < count and pace.pays(confidences) and (not drafted or drafted[-1] not in written.eos):
            new = torch.tensor([drafted[-1:]]) if drafted else written.ids()[:, self.read() :]
            confidence, token = self._forward(new, 1)[0, 0].float().softmax(-1).max(-1)
            drafted.append(int(token))
            confidences.append(float(confidence))
        return drafted, confidences

    def keep(self, tokens: int) -> None:
        """Takes back what was read beyond the first tokens of the sequence: drafted ones that were not accepted."""
        if self.read() > tokens:
            crop(self.model, self.cache, self.read() - tokens)
            del self.tokens[tokens:]

    def catch_up(self, written: Written) -> tuple[int, int]:
        """Reads all but the last token; how many of the last new ones it would have drafted, and of how many."""
        unread = written.ids()[:, self.read() : -1]
        if not unread.shape[1] or (self.context is not None and written.length > self.context):
            return 0, 0
        of = min(unread.shape[1], written.length - 1 - written.prompt, MEMORY)
        likeliest = self._forward(unread, max(of, 1))[0].argmax(-1)
        return int((likeliest.cpu() == written.ids()[0, -of:].cpu()).sum()) if of > 0 else 0, max(of, 0)

    def _forward(self, tokens: torch.Tensor, kept: int) -> torch.Tensor:
        """Logits `[1, kept, V]` of the last of new tokens."""
        options = {"logits_to_keep": kept} if self.keeps else {}
        tokens = tokens.to(self.model.device)
        output = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, return_dict=True, **options)
        self.tokens += tokens[0].tolist()
        return output.logits[:, -kept:]


# ---- how many tokens to draft ----


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens of a check of so many drafted ones, each accepted with a probability (section 3.1, equation 1)."""
    return float(drafted + 1) if acceptance == 1 else (1 - acceptance ** (drafted + 1)) / (1 - acceptance)


def best_count(
    acceptance: float, draft_seconds: float, check_seconds: Callable[[int], float], most: int = MOST_DRAFTED
) -> tuple[int, float]:
    """How many tokens to draft, 0 included, for the most tokens a second; how many times those without a draft.

    Theorem 3.8 with a check that costs more the more it checks.

    Args:
        acceptance: probability that a drafted token is accepted.
        draft_seconds: of one drafted token.
        check_seconds: of a step of the model over so many tokens.
    """
    speeds = [
        expected_tokens(acceptance, count) / (count * draft_seconds + check_seconds(1 + count))
        for count in range(most + 1)
    ]
    best = max(range(most + 1), key=speeds.__getitem__)
    return best, speeds[best] / speeds[0]


class Pace:
    """How many tokens are drafted, by what was measured of a model and a draft; both keep it between calls.

    The draft goes on while the chance that all its tokens are accepted is worth another one; how often tokens are of
    which it is more or less sure, is counted. Where no draft pays, it rests. After a pause it reads what was written
    meanwhile, all at once, which says how many of these tokens it would have got right, and drafts once; while that
    does not pay, pauses become longer.
    """

    def __init__(self) -> None:
        self.accepted, self.of = 1.6, 2.0  # a guess that a few tokens outweigh
        self.bands = [[0.0, 0.0] for _ in range(len(CONFIDENCES) + 1)]  # the same, by how sure the draft is
        self.checks: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))  # seconds, by tokens
        self.drafts: deque[float] = deque(maxlen=RECENT)  # seconds of one drafted token
        self.steps: deque[tuple[int, int]] = deque(maxlen=STEPS)  # tokens drafted, and added
        self.least = 0.0  # chance that is worth another token
        self.asked = 0
        self.rests = False
        self.pause, self.left = FIRST_PAUSE, 0

    def wanted(self, look: Callable[[], tuple[int, int]]) -> int:
        """The most tokens to draft now. `look` gives accepted tokens, and of how many, of those written in a pause."""
        self.asked += 1
        if self.left > 0 or self.asked % PLAIN_EVERY == 1:  # a step alone is what all is compared with
            return 0
        if self.rests:
            self.accept(*look())
            self._resume()
        count = FIRST_DRAFTED
        if self.drafts:
            count, gain = self.best()
            seconds = self._check_seconds()
            self.least = gain / seconds(1) * (median(self.drafts) + seconds(2) - seconds(1)) / self.acceptance()
            self._rest(count == 0 or self.gain() < 1)
            count = 0 if self.rests else MOST_DRAFTED
        return count

    def _resume(self) -> None:
        """Forgets all costs but that of a step alone: the machine, or the context, may be another now."""
        self.rests, self.least = False, 0.0
        for tokens in self.checks.keys() - {1}:
            del self.checks[tokens]
        self.drafts.clear()
        self.steps.clear()

    def _rest(self, rests: bool) -> None:
        self.rests = rests
        self.left = self.pause if rests else 0
        self.pause = min(4 * self.pause, LONGEST_PAUSE) if rests else FIRST_PAUSE

    def pays(self, confidences: Sequence[float]) -> bool:
        """Whether another token is worth its draft and check, by how sure the draft was of those it has."""
        return prod(map(self.chance, confidences)) > self.least

    def chance(self, confidence: float) -> float:
        """That a token of this confidence is accepted."""
        accepted, of = self.bands[bisect(CONFIDENCES, confidence)]
        return (accepted + 1 + confidence) / (of + 2)

    def best(self) -> tuple[int, float]:
        """See `best_count`."""
        return best_count(self.acceptance(), median(self.drafts), self._check_seconds())

    def acceptance(self) -> float:
        return self.accepted / self.of

    def gain(self) -> float:
        """How many times the tokens a second of steps alone the last steps had; infinite as long as these are few."""
        if len(self.steps) < STEPS:
            return inf
        seconds, draft_seconds = self._check_seconds(), median(self.drafts)
        taken = sum(count * draft_seconds + seconds(1 + count) for count, _ in self.steps)
        return sum(added for _, added in self.steps) * seconds(1) / taken

    def accept(self, accepted: int, of: int) -> None:
        """Counts drafted tokens up to the first one that was not accepted; older ones count less."""
        kept = (1 - 1 / MEMORY) ** of
        self.accepted, self.of = kept * self.accepted + accepted, kept * self.of + of

    def measure(
        self, confidences: Sequence[float], added: int, accepted: int, draft_seconds: float, check_seconds: float
    ) -> None:
        """Counts a step: how sure the draft was of its tokens, tokens added, drafted ones among them, and the time."""
        self.left -= added
        self.checks[1 + len(confidences)].append(check_seconds)
        if not confidences:
            return
        self.drafts.append(draft_seconds / len(confidences))
        self.steps.append((len(confidences), added))
        self.accept(accepted, min(added, len(confidences)))
        for index, confidence in enumerate(confidences[:added]):
            band = self.bands[bisect(CONFIDENCES, confidence)]
            band[:] = [(1 - 1 / MEMORY) * band[0] + (index < accepted), (1 - 1 / MEMORY) * band[1] + 1]

    def _check_seconds(self) -> Callable[[int], float]:
        """Seconds of a check by its tokens: a line through the medians, which are taken of some numbers only."""
        medians = [(tokens, median(seconds)) for tokens, seconds in self.checks.items() for _ in seconds]
        tokens, seconds = zip(*medians, strict=True)
        slope = ONE_MORE * seconds[0] / tokens[0]
        if len(set(tokens)) > 1:
            slope = max(linear_regression(tokens, seconds).slope, 0.0)
        offset = fmean(seconds) - slope * fmean(tokens)
        return lambda tokens: offset + slope * tokens
