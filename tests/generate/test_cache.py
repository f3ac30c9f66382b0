"""A cache of integers: what rounding costs, what the model makes of it, and all that generation does to a cache."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_llmkernel import IntegerCache, LLMKernelConfig, LLMKernelForCausalLM
from hf_llmkernel.generate.cache import restore_states, round_states

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build(**fields) -> Any:
    torch.manual_seed(0)
    return LLMKernelForCausalLM(LLMKernelConfig(**{**TINY, **fields})).eval()


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_to_the_nearest_of_each_group(bits, group_size, dtype):
    states = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    states[0, 0, 0] = 0.5  # a group without a range
    restored = restore_states(*round_states(states, bits, group_size), bits)
    assert restored.dtype == dtype and restored.shape == states.shape
    exact = 1e-6 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    for group, found in zip(states.reshape(-1, group_size), restored.reshape(-1, group_size), strict=True):
        step = (group.max().float() - group.min().float()) / (2**bits - 1)
        # Half a step, and what the dtype's own rounding of scale and sum makes of the largest value.
        assert (group.float() - found.float()).abs().max() <= step / 2 + 2 * exact * group.abs().max().float()
    torch.testing.assert_close(restored[0, 0, 0], states[0, 0, 0])


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.25)])
def test_a_call_is_exact_and_later_ones_are_near(bits, tolerance):
    model, ids = build(initializer_range=0.1), tokens()
    cache: Any
    cache, full = IntegerCache(model.config, bits), DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(first, model(ids, past_key_values=full).logits, atol=1e-5, rtol=1e-5)
        for step in range(4):
            token = tokens(2, 4)[:, step : step + 1]
            found = model(token, past_key_values=cache).logits
            expected = model(token, past_key_values=full).logits
            assert (found - expected).norm() <= tolerance * expected.norm()
    assert cache.get_seq_length() == full.get_seq_length() == 16


@pytest.mark.parametrize(("bits", "share"), [(8, 0.25 + 2 / 64), (4, 0.125 + 4 / 64)])
def test_bytes_are_those_of_the_codes_and_their_scales(bits, share):
    model = build(hidden_size=256)  # heads of 64
    cache: Any = IntegerCache(model.config, bits)
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
    assert cache.nbytes() == share * (2 * 3 * 2 * 2 * 12 * 64 * 4)  # of K and V, layers, rows, heads, tokens, D, fp32


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},  # takes tokens back
}


SHAPES = {
    "full": {},
    "sliding": {"sliding_window": 6},
    "per_layer": {
        "per_layer_config": {0: {"skip": ["attention"]}, 2: {"num_attention_heads": 2, "num_key_value_heads": 1}}
    },
}
# Of a cache that the caller makes, the library lets no window take tokens back.
CASES = [(way, shape) for way in WAYS for shape in SHAPES if (way, shape) != ("prompt_lookup", "sliding")]


@pytest.mark.parametrize(("way", "shape"), CASES)
def test_generation_of_every_kind_agrees_with_the_full_cache(way, shape):
    model = build(**SHAPES[shape])
    ids = tokens(1 if way == "prompt_lookup" else 2).repeat(1, 2 if way == "prompt_lookup" else 1)
    options = {"max_new_tokens": 8, **{"do_sample": False}, **WAYS[way]}

    def run(cache):
        torch.manual_seed(3)
        return model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)

    expected, found = run(DynamicCache(config=model.config)), run(IntegerCache(model.config, 8))
    assert found.shape == expected.shape
    assert (found == expected).float().mean() > 0.9  # a near-tie may fall the other way


def test_windows_hold_no_more_than_the_next_token_sees():
    model = build(sliding_window=6)
    cache: Any
    cache, full = IntegerCache(model.config), DynamicCache(config=model.config)
    ids = tokens(2, 20)
    with torch.no_grad():
        for start in range(0, 20, 4):
            part = ids[:, start : start + 4]
            found = model(part, past_key_values=cache).logits
            expected = model(part, past_key_values=full).logits
            assert (found - expected).norm() <= 0.02 * expected.norm()
    assert all(layer.key_room.states().shape[-2] == 5 for layer in cache.layers)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.layers[0].crop(-2)


def test_rows_and_tokens_are_taken_and_repeated():
    model = build()
    cache: Any = IntegerCache(model.config, 4)
    with torch.no_grad():
        model(tokens(3, 10), past_key_values=cache)
    before = [room.states().clone() for room in cache.layers[0].rooms]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.crop(-4)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 5]))
    for room, stored in zip(cache.layers[0].rooms, before, strict=True):
        assert torch.equal(room.states(), stored[[2, 0]][:, :, :6])
    assert cache.get_seq_length() == 6
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({}, {"bits": 2}, "bits=2: must be 8 or 4"),
        ({}, {"bits": 8, "group_size": 5}, "group_size=5: must divide head_dim=16"),
        ({}, {"bits": 8, "group_size": 0}, "group_size=0: must divide head_dim=16"),
    ],
)
def test_what_cannot_be_is_refused(fields, settings, message):
    with pytest.raises(ValueError, match=message):
        IntegerCache(LLMKernelConfig(**TINY, **fields), **settings)
