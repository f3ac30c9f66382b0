"""Steps and prompts over a cache of integers: against torch's forward over the same one, and the records against it."""

import pytest
import torch
from transformers import DynamicCache

from hf_llmkernel import IntegerCache
from hf_llmkernel.generate.cache import restore_states, round_states
from hf_llmkernel.kernels import disabled

from .test_step import decoded, prompt, random_model, read

# head_dim, bits, group_size: whole vectors, parts of them, several groups, groups that end within a vector.
ROUNDINGS = [(64, 8, 64), (64, 8, 32), (64, 4, 32), (64, 4, 64), (10, 8, 10), (24, 8, 12), (24, 4, 12), (40, 8, 5)]
# Logits move where a token sees itself rounded, which torch's forward does not do.
NEAR = {8: 0.01, 4: 0.15}


def rounded(cache, room) -> tuple[torch.Tensor, ...]:
    """Codes one a byte, scales and lowest values of what a layer holds."""
    layer = cache.layers[0]
    records = getattr(layer, room).states()
    width, groups = layer.head_dim * layer.bits // 8, layer.head_dim // layer.group_size * layer.dtype.itemsize
    codes, scales, low = records.split([width, groups, groups], dim=-1)
    codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2) if layer.bits == 4 else codes
    copies = (part.clone(memory_format=torch.contiguous_format) for part in (scales, low))
    return codes.int(), *(copy.view(layer.dtype).float() for copy in copies)


@pytest.mark.parametrize(("head_dim", "bits", "group_size"), ROUNDINGS)
def test_steps_are_near_torchs_forward(level, head_dim, bits, group_size, native_calls, monkeypatch):
    model, ids = random_model(head_dim=head_dim, initializer_range=0.1), prompt(2, 70)
    caches = [IntegerCache(model.config, bits, group_size) for _ in range(2)]
    expected = decoded(model, ids, cache=caches[0], native=False, monkeypatch=monkeypatch)
    logits = decoded(model, ids, cache=caches[1], monkeypatch=monkeypatch)
    assert len(native_calls) == 6
    torch.testing.assert_close(logits[:, 0], expected[:, 0], atol=1e-5, rtol=1e-4)  # the prompt sees itself exactly
    assert (logits - expected).norm() < NEAR[bits] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "bits", "group_size"), ROUNDINGS)
def test_records_are_torchs(level, head_dim, bits, group_size, dtype, native_calls, monkeypatch):
    model = random_model(head_dim=head_dim).to(dtype)
    caches = [IntegerCache(model.config, bits, group_size) for _ in range(2)]
    for cache, native in zip(caches, (False, True), strict=True):
        read(model, prompt(2, 33), native, monkeypatch, past_key_values=cache)
    assert native_calls == [1]
    near = 1e-4 if dtype == torch.float32 else 0.03  # keys in fp32 against keys in bf16
    for room in ("key_room", "value_room"):
        (expected, scales, low), (codes, *found) = (rounded(cache, room) for cache in caches)
        for one, other in zip((scales, low), found, strict=True):
            assert (one - other).norm() <= near * one.norm()
        assert (codes - expected).abs().max() <= (1 if dtype == torch.float32 else 6 if bits == 8 else 1)
        assert (codes == expected).float().mean() > (0.99 if dtype == torch.float32 else 0.4)


@pytest.mark.parametrize(("head_dim", "bits", "group_size"), ROUNDINGS)
def test_attention_over_records_is_that_over_what_they_restore(level, head_dim, bits, group_size, native_calls):
    """One layer's step behind 150 tokens, against the same behind what they are restored to."""
    model, generator = random_model(head_dim=head_dim, num_hidden_layers=1), torch.Generator().manual_seed(2)
    cache, restored, new = IntegerCache(model.config, bits, group_size), DynamicCache(config=model.config), prompt(2, 1)
    past = [3 * torch.randn(2, 2, 150, head_dim, generator=generator) + 1 for _ in range(2)]
    cache.update(*past, 0)
    restored.update(*(restore_states(*round_states(states, bits, group_size), bits) for states in past), 0)
    with disabled():
        expected = model(new, past_key_values=restored, use_cache=True).logits
    found = model(new, past_key_values=cache, use_cache=True).logits
    assert native_calls == [1]
    # One token of 151 is exact there.
    torch.testing.assert_close(found, expected, atol=2e-3 if bits == 8 else 2e-2, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_padded_prompts_windows_and_layers_of_their_own(level, bits, native_calls, monkeypatch):
    shapes = {
        "per_layer_config": {0: {"skip": ["attention"]}, 2: {"num_attention_heads": 2, "num_key_value_heads": 1}},
        "sliding_window": 6,
        "initializer_range": 0.1,
    }
    model, ids, mask = random_model(**shapes), prompt(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    caches = [IntegerCache(model.config, bits, 5 if bits == 8 else 10) for _ in range(2)]
    expected = decoded(model, ids, mask=mask, cache=caches[0], native=False, monkeypatch=monkeypatch)
    logits = decoded(model, ids, mask=mask, cache=caches[1], monkeypatch=monkeypatch)
    assert len(native_calls) == 6
    assert (logits - expected).norm() < NEAR[bits] * expected.norm()
    layers = [cache.layers[1] for cache in caches]
    assert [layer.key_room.length for layer in layers] == [5, 5] and layers[1].get_seq_length() == 14


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("length", [1, 2, 8, 9])
def test_the_first_tokens_are_exact_however_few(level, length, bits, native_calls):
    model, ids = random_model(head_dim=16), prompt(1, length)
    found = model(ids, past_key_values=IntegerCache(model.config, bits), use_cache=True).logits
    expected = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True).logits
    assert native_calls == [1, 1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_several_new_tokens_are_as_one_by_one(level, native_calls):
    """To the bit, which drafted tokens rely on."""
    model, ids = random_model(head_dim=16), prompt(1, 12)
    logits = []
    for parts in ([ids[:, :6], ids[:, 6:]], [ids[:, :6], *ids[:, 6:].split(1, dim=1)]):
        cache = IntegerCache(model.config, 8)
        logits.append(torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1))
    assert len(native_calls) == 9
    assert torch.equal(logits[0][:, 6:], logits[1][:, 6:])


def test_a_prompt_behind_another_sees_it_rounded(level, native_calls, monkeypatch):
    model, ids = random_model(initializer_range=0.1), prompt(2, 60)
    caches = [IntegerCache(model.config, 8) for _ in range(2)]
    found = []
    for cache, native in zip(caches, (False, True), strict=True):
        parts = [read(model, part, native, monkeypatch, past_key_values=cache)[0] for part in ids.split(30, dim=1)]
        found.append(parts[1])
    assert native_calls == [1, 1]
    torch.testing.assert_close(found[1], found[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": False}, {"prompt_lookup_num_tokens": 3}])
def test_generation_takes_native_steps(options, native_calls):
    model, ids = random_model(initializer_range=0.1), prompt(1, 8).repeat(1, 2)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    cache = IntegerCache(model.config, 8)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **given)
    assert native_calls and found.shape == (1, 22)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    assert (found == expected).float().mean() > 0.9  # a near-tie may fall the other way


def test_groups_that_share_a_byte_are_torchs(native_calls, monkeypatch):
    model, ids = random_model(head_dim=6), prompt(1, 5)
    model(ids, past_key_values=IntegerCache(model.config, 4, 3), use_cache=True)
    assert not native_calls
