"""A draft changes how fast a text is written, never the text."""

import copy
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM
from hf_llmkernel.generate import speculative
from hf_llmkernel.generate.speculative import MOST_DRAFTED, Pace, best_count, expected_tokens
from hf_llmkernel.kernels import library

FIELDS = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def random_model(seed=0, **fields) -> LLMKernelForCausalLM:
    torch.manual_seed(seed)
    return LLMKernelForCausalLM(LLMKernelConfig(**{**FIELDS, **fields})).eval().requires_grad_(False)


def near(model, noise=0.02) -> LLMKernelForCausalLM:
    """A copy that agrees on many tokens."""
    torch.manual_seed(1)
    draft = copy.deepcopy(model)
    for weight in draft.parameters():
        weight.add_(noise * weight.std() * torch.randn_like(weight))
    return draft


def prompt(length=9) -> torch.Tensor:
    return torch.randint(61, (1, length), generator=torch.Generator().manual_seed(length))


def greedy(model, ids, tokens: int) -> list[int]:
    """Argmax over whole forwards, without generate() or a cache."""
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


@pytest.fixture(params=["torch", "native"])
def runtime(request, monkeypatch):
    if request.param == "native":
        if library.NATIVE is None:
            pytest.skip("the native library is not built: there is no compiler")
        monkeypatch.setenv("LLMKERNEL_KERNELS", "on")
    return request.param


@pytest.fixture
def counts(monkeypatch):
    """Drafted tokens of every step: a list, whose values come at random, that nothing of the clock decides about."""
    chosen, draws = [], random.Random(0)

    def wanted(self, look):
        if chosen and chosen[-1] == 0:
            self.accept(*look())
        chosen.append(draws.randrange(MOST_DRAFTED + 1))
        return chosen[-1]

    monkeypatch.setattr(Pace, "wanted", wanted)
    return chosen


def pace(draft, model) -> Pace:
    return speculative._paces[draft][model]


DRAFTS = {
    "the model itself": lambda model: model,
    "a near one": near,
    "another": lambda model: random_model(5),
    "fewer layers": lambda model: random_model(6, num_hidden_layers=1, layer_types=None),
    "int4": lambda model: random_model(linear_forms={"down_proj": {"bits": 4, "group_size": 32}}),
    "low rank": lambda model: random_model(linear_forms={"q_proj": {"rank": 4}}),
    "of another family": lambda model: LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval(),
}


@pytest.mark.parametrize("fields", [{}, WINDOWS], ids=["full", "windows"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_tokens_are_those_of_greedy_decoding(fields, draft, runtime, counts):
    model, ids = random_model(**fields), prompt()
    written = model.generate(ids, max_new_tokens=40, assistant_model=DRAFTS[draft](model), pad_token_id=0)
    assert written[0].tolist() == greedy(model, ids, 40)
    assert max(counts) > 4


def test_bf16_has_the_bits_of_greedy_decoding(runtime, counts):
    if runtime == "torch":
        pytest.skip("torch sums several rows in another order than one")
    model = random_model(**WINDOWS, tie_word_embeddings=True).bfloat16()
    expected = model.generate(prompt(), max_new_tokens=150, pad_token_id=0)
    written = model.generate(prompt(), max_new_tokens=150, assistant_model=near(model), pad_token_id=0)
    assert torch.equal(written, expected)


def test_the_model_itself_is_always_accepted_and_another_hardly_ever(counts):
    model, other = random_model(), random_model(5)
    model.generate(prompt(), max_new_tokens=60, assistant_model=model, pad_token_id=0)
    assert pace(model, model).acceptance() > 0.93  # from a guess of 0.8
    model.generate(prompt(), max_new_tokens=60, assistant_model=other, pad_token_id=0)
    assert pace(other, model).acceptance() < 0.2
    assert len(counts) < 90  # of 120 tokens


def test_drafts_take_native_steps_and_windows_stay_native(monkeypatch, counts):
    if library.NATIVE is None:
        pytest.skip("the native library is not built: there is no compiler")
    monkeypatch.setenv("LLMKERNEL_KERNELS", "on")
    from hf_llmkernel.kernels import step

    served, native = [], step._step
    monkeypatch.setattr(step, "_step", lambda *arguments: served.append(native(*arguments)) or served[-1])
    model = random_model(**WINDOWS)
    model.generate(prompt(), max_new_tokens=30, assistant_model=near(model), pad_token_id=0)
    assert len(served) > len(counts)
    assert all(logits is not None for logits in served)


class Collected:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


def test_an_end_within_a_draft_streamed_token_by_token(runtime, counts):
    model, ids = random_model(), prompt()
    new = greedy(model, ids, 40)[ids.shape[1] :]
    for place in (0, 7, 20):
        plain, drafted = Collected(), Collected()
        options = {"max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": [new[place], 60]}
        expected = model.generate(ids, streamer=plain, **options)
        written = model.generate(ids, streamer=drafted, assistant_model=near(model), **options)
        assert torch.equal(written, expected) and written.shape[1] < ids.shape[1] + 40
        assert drafted.values == plain.values and drafted.ended == plain.ended == 1


def test_stop_strings(counts):
    alphabet = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(alphabet, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model, ids = random_model(), prompt()
    options = {"max_new_tokens": 30, "pad_token_id": 0, "tokenizer": PreTrainedTokenizerFast(tokenizer_object=backend)}
    tokens = greedy(model, ids, 12)[-2:]
    options["stop_strings"] = ["".join(chr(33 + token) for token in tokens)]
    expected = model.generate(ids, **options)
    assert expected.shape[1] == 21
    assert torch.equal(model.generate(ids, assistant_model=near(model), **options), expected)


class Counting(StoppingCriteria):
    """Stops at the eleventh time it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape[1])
        return torch.tensor([len(self.asked) > 10])


def test_criteria_and_processors_see_every_token_once(counts):
    model, ids, eos = random_model(), prompt(), None
    seen = []

    def processor(input_ids, scores):
        seen.append(input_ids[0].tolist())
        return scores - 3.0 * torch.nn.functional.one_hot(input_ids[0], 61).sum(0)

    eos = greedy(model, ids, 3)[-1]
    options = {"pad_token_id": 0, "max_new_tokens": 30, "min_new_tokens": 20, "eos_token_id": eos}
    results = []
    for draft in ({}, {"assistant_model": near(model)}):
        seen.clear()
        criterion = Counting()
        written = model.generate(
            ids, logits_processor=[processor], stopping_criteria=StoppingCriteriaList([criterion]), **options, **draft
        )
        results.append((written.tolist(), list(seen), criterion.asked))
    assert results[0] == results[1] and len(results[0][2]) == 11
    expected = model.generate(ids, repetition_penalty=1.7, no_repeat_ngram_size=3, **options)
    found = model.generate(ids, repetition_penalty=1.7, no_repeat_ngram_size=3, assistant_model=near(model), **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("fields", [{}, WINDOWS, {**WINDOWS, "sliding_window": 20}], ids=["full", "windows", "filling"])
def test_the_cache_is_that_of_greedy_decoding_and_goes_on(fields, runtime, counts):
    model, ids = random_model(**fields), prompt(4)
    options = {"return_dict_in_generate": True, "pad_token_id": 0}
    whole = model.generate(ids, max_new_tokens=50, **options)
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, max_new_tokens=21, past_key_values=cache, assistant_model=near(model), **options)
    assert first.past_key_values is cache and cache.get_seq_length() == 24
    output = model.generate(
        first.sequences, max_new_tokens=29, past_key_values=cache, assistant_model=near(model), **options
    )
    assert torch.equal(output.sequences, whole.sequences)
    for layer, other in zip(cache.layers, whole.past_key_values.layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length() == 53
        torch.testing.assert_close(layer.keys, other.keys[:, :, -layer.keys.shape[2] :], rtol=1e-4, atol=1e-4)


def test_a_draft_of_a_shorter_context_ends_there(counts):
    model = random_model()
    draft = near(model)
    draft.config.max_position_embeddings = 20
    lengths = []

    def note(module, arguments, options) -> None:
        lengths.append(options["input_ids"].shape[1])

    draft.register_forward_pre_hook(note, with_kwargs=True)
    written = model.generate(prompt(), max_new_tokens=40, assistant_model=draft, pad_token_id=0)
    assert written[0].tolist() == greedy(model, prompt(), 40)
    assert sum(lengths) < 40


def test_what_this_loop_does_not_serve_is_transformers(monkeypatch, counts):
    model, ids = random_model(), prompt()
    draft = near(model)
    expected = model.generate(ids, max_new_tokens=10, pad_token_id=0)
    calls = {
        "scores": {"return_dict_in_generate": True, "output_scores": True},
        "sampling": {"do_sample": True},
        "mask": {"attention_mask": torch.tensor([[0, 0, *[1] * 7]])},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }
    for options in calls.values():
        model.generate(ids, max_new_tokens=10, pad_token_id=0, assistant_model=draft, **options)
    assert not counts
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        model.generate(ids.expand(2, -1), max_new_tokens=10, pad_token_id=0, assistant_model=draft)
    with pytest.raises(ValueError, match="different tokenizers"):
        model.generate(ids, max_new_tokens=10, pad_token_id=0, assistant_model=random_model(vocab_size=60))
    assert torch.equal(model.generate(ids, max_new_tokens=10, pad_token_id=0, assistant_model=draft), expected)
    assert counts


# ---- how many tokens to draft ----


def test_expected_tokens_is_a_mean_over_drafts():
    """Of tokens that are accepted independently, up to the first that is not, and one more of the check."""
    draws = random.Random(0)
    for acceptance, drafted in ((0.0, 3), (0.6, 1), (0.8, 5), (1.0, 4)):
        total = 0
        for _ in range(20000):
            accepted = 0
            while accepted < drafted and draws.random() < acceptance:
                accepted += 1
            total += accepted + 1
        assert expected_tokens(acceptance, drafted) == pytest.approx(total / 20000, rel=0.02)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("draft_seconds", [0.05, 0.4, 1.1])
@pytest.mark.parametrize("more", [0.0, 0.05, 0.5])
def test_the_best_count_is_that_of_a_search(acceptance, draft_seconds, more):
    def speed(count: int) -> float:
        tokens = sum(acceptance**index for index in range(count + 1))
        return tokens / (count * draft_seconds + 1 + more * count)

    count, gain = best_count(acceptance, draft_seconds, lambda tokens: 1 + more * (tokens - 1))
    assert gain == pytest.approx(max(map(speed, range(MOST_DRAFTED + 1))) / speed(0))
    assert speed(count) == pytest.approx(gain * speed(0))


class World:
    """Tokens of which the draft is sure, and others; `certain` is how many of all are sure ones."""

    def __init__(self, certain: float, sure: float, unsure: float, draft_seconds: float):
        self.certain, self.chances, self.draft_seconds = certain, (unsure, sure), draft_seconds
        self.draws, self.seconds, self.unread = random.Random(0), 0.0, 0

    def token(self) -> tuple[float, bool]:
        sure = self.draws.random() < self.certain
        return (0.95 if sure else 0.5), self.draws.random() < self.chances[sure]

    def look(self) -> tuple[int, int]:
        self.seconds += 0.1 * self.draft_seconds * self.unread
        of, self.unread = min(self.unread, 64), 0
        return sum(self.token()[1] for _ in range(of)), of

    def step(self, pace: Pace) -> int:
        count, tokens = pace.wanted(self.look), []
        while len(tokens) < count and pace.pays([confidence for confidence, _ in tokens]):
            tokens.append(self.token())
        hits = [hit for _, hit in tokens] + [False]
        accepted = hits.index(False)
        drafted, check = len(tokens) * self.draft_seconds, 1 + 0.06 * len(tokens)
        noisy = check * self.draws.uniform(0.9, 1.2) * (10 if self.draws.random() < 0.03 else 1)
        pace.measure([confidence for confidence, _ in tokens], accepted + 1, accepted, drafted, noisy)
        self.seconds += drafted + check
        self.unread = 0 if tokens else self.unread + 1
        return accepted + 1


def simulate(world: World, tokens: int) -> tuple[Pace, float]:
    """A pace after so many tokens, and how many times the tokens a second of steps alone."""
    pace, written = Pace(), 0
    while written < tokens:
        written += world.step(pace)
    return pace, written / world.seconds


def test_a_pace_finds_the_best_count():
    pace, speed = simulate(World(1.0, 0.9, 0.0, 0.2), 1000)
    best, gain = best_count(0.9, 0.2, lambda tokens: 1 + 0.06 * (tokens - 1))
    assert abs(pace.best()[0] - best) <= 1 and not pace.rests
    assert speed > 0.93 * gain


def test_drafts_end_where_the_draft_is_unsure():
    """Better than any number of tokens that knows nothing of it."""
    _, speed = simulate(World(0.7, 0.97, 0.4, 0.2), 2000)
    acceptance = 0.7 * 0.97 + 0.3 * 0.4
    assert speed > 1.04 * best_count(acceptance, 0.2, lambda tokens: 1 + 0.06 * (tokens - 1))[1]


def test_a_draft_that_does_not_pay_rests_and_costs_little():
    pace, speed = simulate(World(0.5, 0.2, 0.1, 0.5), 600)
    assert pace.rests and pace.pause > 200
    assert speed > 0.95


def test_a_rest_ends_when_the_text_becomes_predictable():
    world = World(0.5, 0.2, 0.1, 0.3)
    pace, _ = simulate(world, 200)
    assert pace.rests
    world.certain, world.chances = 0.8, (0.5, 0.98)
    for _ in range(400):
        world.step(pace)
    assert not pace.rests and pace.acceptance() > 0.7
