"""Requests that join and leave a batch get the tokens that `generate()` gives each alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM
from hf_llmkernel.generate import batch as batch_module
from hf_llmkernel.generate.batch import Batch, Request, fits_batches
from hf_llmkernel.kernels import library
from hf_llmkernel.kernels.cache import RoomyLayer

PROMPTS = [[4, 5, 6], [7], list(range(10, 30)), [9, 8], [40, 41, 42, 43]]


class Collected:
    """A sink that keeps tokens, and wants no more than `most`."""

    def __init__(self, most=99):
        self.tokens, self.most, self.finished, self.error = [], most, False, None

    @property
    def ended(self):
        return len(self.tokens) >= self.most

    def put(self, value):
        self.tokens += value.tolist()

    def end(self):
        self.finished = True

    def fail(self, error):
        self.error = error


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def uneven():
    """The first layer does not attend; what `generate()` needs to know of it, a batch needs too."""
    torch.manual_seed(3)
    config = LLMKernelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        per_layer_config={0: {"skip": ["attention"]}},
        bos_token_id=None,
        eos_token_id=None,
    )
    return LLMKernelForCausalLM(config).eval()


@pytest.fixture(scope="module")
def sliding():
    """A layer that forgets: one request at a time."""
    torch.manual_seed(3)
    config = LLMKernelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        layer_types=["sliding_attention"],
        sliding_window=4,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LLMKernelForCausalLM(config).eval()


def generated(model, ids: list[int], seed=None, **options) -> list[int]:
    if seed is not None:
        torch.manual_seed(seed)
    tokens = torch.tensor([ids])
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(ids) :].tolist()


def run(batch: Batch) -> None:
    for _ in range(200):
        if not batch.is_busy():
            return
        batch.step()
    pytest.fail("the batch does not end")


@pytest.mark.parametrize("name", ["model", "uneven"])
@pytest.mark.parametrize("most", [1, 3])
def test_every_request_gets_its_own_greedy_tokens(name, most, request):
    network = request.getfixturevalue(name)
    batch = Batch(network, most)
    sinks = [Collected() for _ in PROMPTS]
    for index, (ids, sink) in enumerate(zip(PROMPTS, sinks, strict=True)):
        config = GenerationConfig(do_sample=False, max_new_tokens=4 + 5 * index)
        batch.waiting.append(Request(network, ids, config, sink))
    run(batch)
    for index, (ids, sink) in enumerate(zip(PROMPTS, sinks, strict=True)):
        assert sink.tokens == generated(network, ids, do_sample=False, max_new_tokens=4 + 5 * index)
        assert sink.finished and sink.error is None
    assert batch.cache is None and batch.lengths == []


def test_no_more_run_than_may_and_the_cache_shrinks_to_the_longest(model):
    batch = Batch(model, 2)
    for ids, most in ((PROMPTS[2], 3), (PROMPTS[0], 20), (PROMPTS[1], 20)):
        config = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=63)
        batch.waiting.append(Request(model, ids, config, Collected()))
    batch.step()
    assert (len(batch.running), batch.cache.get_seq_length()) == (1, 21)
    batch.step()
    assert (len(batch.running), batch.lengths, batch.cache.get_seq_length()) == (1, [4], 4)
    batch.step()
    assert (len(batch.running), batch.lengths, batch.cache.get_seq_length()) == (2, [5, 2], 5)


def test_a_sample_is_that_of_generate_whoever_runs_beside(model):
    options = {"do_sample": True, "temperature": 3.0, "top_p": 0.9, "max_new_tokens": 12}
    batch, sinks = Batch(model, 4), [Collected() for _ in range(3)]
    for seed, sink in enumerate(sinks):
        batch.waiting.append(Request(model, PROMPTS[seed], GenerationConfig(**options), sink, seed))
    run(batch)
    assert [sink.tokens for sink in sinks] == [
        generated(model, PROMPTS[seed], seed, **options) for seed in range(len(sinks))
    ]
    assert sinks[0].tokens != generated(model, PROMPTS[0], 5, **options)


def test_processors_see_the_request_alone(model):
    options = {"do_sample": False, "repetition_penalty": 1.8, "min_new_tokens": 6, "max_new_tokens": 9}
    batch, sinks = Batch(model, 4), [Collected() for _ in PROMPTS]
    for ids, sink in zip(PROMPTS, sinks, strict=True):
        batch.waiting.append(Request(model, ids, GenerationConfig(**options), sink))
    run(batch)
    assert [sink.tokens for sink in sinks] == [generated(model, ids, **options) for ids in PROMPTS]


def test_who_wants_no_more_makes_room(model):
    batch, config = Batch(model, 2), GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=63)
    first, second, third = Collected(), Collected(most=3), Collected(most=0)
    for ids, sink in zip(PROMPTS, (first, second, third), strict=False):
        batch.waiting.append(Request(model, ids, config, sink))
    run(batch)
    assert second.finished and len(second.tokens) == 3
    assert third.finished and third.tokens == []
    assert first.tokens == generated(model, PROMPTS[0], do_sample=False, max_new_tokens=20, eos_token_id=63)


def test_a_fault_ends_those_it_concerns(model, monkeypatch):
    batch, config = Batch(model, 4), GenerationConfig(do_sample=False, max_new_tokens=5, eos_token_id=63)
    good, bad = Collected(), Collected()
    batch.waiting.append(Request(model, PROMPTS[0], config, good))
    batch.waiting.append(Request(model, [99999], config, bad))  # beyond the vocabulary
    run(batch)
    assert isinstance(bad.error, IndexError) and not bad.finished
    assert good.error is None and len(good.tokens) == 5
    batch.waiting.append(Request(model, PROMPTS[0], config, failing := Collected()))
    monkeypatch.setattr(batch, "_decode", lambda: 1 / 0)
    run(batch)
    assert isinstance(failing.error, ZeroDivisionError) and batch.cache is None


@pytest.mark.parametrize("name", ["model", "uneven", "sliding"])
def test_who_runs_gets_a_token_between_pieces_of_a_prompt(name, request, monkeypatch):
    network = request.getfixturevalue(name)
    monkeypatch.setattr(batch_module, "PIECE", 8)
    batch, first, second = Batch(network, 4), Collected(), Collected()
    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=64)
    batch.waiting.append(Request(network, PROMPTS[0], config, first))
    batch.step()
    batch.waiting.append(Request(network, PROMPTS[2], config, second))  # 20 tokens: 7, 7 and 6
    got = []
    while not first.finished:
        batch.step()
        got.append((len(first.tokens), len(second.tokens)))
    expected = [(3, 0), (4, 0), (5, 2), (6, 3)] if name != "sliding" else [(3, 0), (4, 0), (5, 0), (6, 0)]
    assert got[:4] == expected
    run(batch)
    for ids, sink in ((PROMPTS[0], first), (PROMPTS[2], second)):
        assert sink.tokens == generated(network, ids, do_sample=False, max_new_tokens=12, eos_token_id=64)
    assert second.finished and batch.reading is None


def test_a_prompt_nobody_waits_for_is_not_read_on(model, monkeypatch):
    monkeypatch.setattr(batch_module, "PIECE", 8)
    batch, sink = Batch(model, 4), Collected()
    batch.waiting.append(Request(model, PROMPTS[2], GenerationConfig(max_new_tokens=9), sink))
    batch.step()
    assert batch.reading is not None and batch.reading.seen == 7 and batch.is_busy()
    sink.most = 0
    batch.step()
    assert sink.finished and not sink.tokens and not batch.is_busy()


@pytest.fixture
def native(monkeypatch):
    """A model of packed linears, run by native steps."""
    if library.NATIVE is None:
        pytest.skip("the native library is not built: there is no compiler")
    monkeypatch.setenv("LLMKERNEL_KERNELS", "on")
    torch.manual_seed(4)
    config = LLMKernelConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        linear_forms={"q_proj": {"bits": 8, "group_size": 32}, "down_proj": {"bits": 4, "group_size": 32}},
        bos_token_id=None,
        eos_token_id=None,
    )
    return LLMKernelForCausalLM(config).eval()


def test_pieces_are_read_as_the_whole_is(native):
    """To the bit: the last of three pieces has the logits of one forward over all of the prompt."""
    ids = [4 + index % 50 for index in range(2 * batch_module.PIECE + 3)]
    batch, logits = Batch(native, 4), []
    request = Request(native, ids, GenerationConfig(do_sample=False, max_new_tokens=1), Collected())
    request.choose = lambda row: logits.append(row)  # type: ignore[method-assign]
    batch.waiting.append(request)
    for seen in (87, 173, 259):
        assert not logits
        batch.step()
        assert batch.reading is None or batch.reading.seen == seen
    with torch.no_grad():
        whole = native(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(logits[0], whole, rtol=0, atol=0)


def test_native_steps_serve_a_batch(native):
    """Of packed linears too, and with the tokens that native steps give a request alone."""
    network = native
    batch, sinks = Batch(network, 4), [Collected() for _ in PROMPTS]
    for ids, sink in zip(PROMPTS, sinks, strict=True):
        batch.waiting.append(Request(network, ids, GenerationConfig(do_sample=False, max_new_tokens=8), sink))
    batch.step()
    batch.step()
    assert {type(layer) for layer in batch.cache.layers} == {RoomyLayer}
    run(batch)
    assert [sink.tokens for sink in sinks] == [
        generated(network, ids, do_sample=False, max_new_tokens=8) for ids in PROMPTS
    ]


def test_layers_that_forget_run_one_request_at_a_time(uneven, sliding):
    assert fits_batches(uneven) and not fits_batches(sliding)
    assert Batch(sliding, 8).most == 1
