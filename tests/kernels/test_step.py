"""Whole decoding steps: the logits of torch's own forward, and when torch has to serve."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from hf_llmkernel import IntegerCache, LLMKernelConfig, LLMKernelForCausalLM
from hf_llmkernel.kernels import disabled, library, step
from hf_llmkernel.kernels.cache import RoomyLayer, RoomySlidingLayer
from hf_llmkernel.model.linear_llm_kernel import PackedLinear

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def forms(names=LINEARS, **fields) -> dict:
    return {"linear_forms": {name: dict(fields) for name in names}}


CONFIGS = {
    "dense": {},
    "tied, QK norm": {"qk_norm": True, "tie_word_embeddings": True, "head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "not gated, GELU": {"mlp_gated": False, "hidden_act": "gelu"},
    "tanh GELU": {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1},
    "scaled rotation": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "layers of their own": {
        "per_layer_config": {
            0: {"skip": ["attention"], "intermediate_size": 32},
            1: {"num_attention_heads": 2, "num_key_value_heads": 1},
            2: {"skip": ["mlp"], "linear_forms": {"q_proj": {"bits": 4, "group_size": 16}}},
        }
    },
    "int4": {**forms(bits=4, group_size=16, symmetric=False), "embed_tokens_form": {"bits": 4, "group_size": 32}},
    "int8": {
        **forms(bits=8),
        "embed_tokens_form": {"bits": 8, "group_size": 24, "symmetric": False},
        "tie_word_embeddings": True,
    },
    "sparse int8": {**forms(bits=8, sparsity="2:4"), "lm_head_form": {"sparsity": "2:4", "bits": 4}},
    "sparse embedding": {"embed_tokens_form": {"bits": 8, "sparsity": "2:4"}},
    "low rank": forms(rank=12),
    "mixed forms": {
        "linear_forms": {
            "q_proj": {"rank": 8, "a": {"bits": 4, "group_size": 32}},
            "k_proj": {"bits": 4, "group_size": 32},
            "gate_proj": {"rank": 16, "b": {"bits": 8}},
            "down_proj": {"rank": 8},
        },
        "lm_head_form": {"rank": 16},
    },
}


@pytest.fixture
def model(request):
    """A random model of one of `CONFIGS`, evaluating, without gradients."""
    return random_model(**CONFIGS[request.param])


def random_model(**fields) -> LLMKernelForCausalLM:
    torch.manual_seed(0)
    return LLMKernelForCausalLM(LLMKernelConfig(**{**SIZES, **fields})).eval().requires_grad_(False)


def decoded(model, ids, steps=5, mask=None, cache=None, native=True, monkeypatch=None) -> torch.Tensor:
    """Logits `[B, 1 + steps, V]` of a prompt and tokens after it; without `native`, of torch and native linears."""
    logits, cache = [], cache or DynamicCache(config=model.config)
    with monkeypatch.context() as patch:
        if not native:
            patch.setattr(step, "_is_step", lambda *arguments: False)
        for index in range(steps + 1):
            new = ids if index == 0 else (7 * ids[:, -1:] + 5 * index) % model.vocab_size
            if mask is not None and index:
                mask = torch.cat((mask, torch.ones(len(mask), 1, dtype=mask.dtype)), dim=1)
            positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
            output = model(new, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", CONFIGS, indirect=True)
def test_a_step_is_torchs_forward(level, model, batch, native_calls, monkeypatch):
    ids = prompt(batch, 9)
    expected = decoded(model, ids, native=False, monkeypatch=monkeypatch)
    assert not native_calls
    logits = decoded(model, ids, monkeypatch=monkeypatch)
    assert len(native_calls) == 6
    # Sums in another order tip an activation over to the next of 255 integers now and then.
    tolerance = 0.03 if '"bits"' in model.config.to_json_string() else 1e-5
    assert (logits - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("way", ["context", "environment"])
@pytest.mark.parametrize("model", ["int4", "int8", "sparse int8", "mixed forms"], indirect=True)
def test_steps_by_floating_activations_are_torchs_to_rounding(level, model, way, native_calls, monkeypatch):
    ids = prompt(2, 9)
    with disabled():
        expected = decoded(model, ids, native=False, monkeypatch=monkeypatch)
    decoded(model, ids, steps=1, monkeypatch=monkeypatch)  # a plan that rounds is there
    native_calls.clear()
    if way == "environment":
        monkeypatch.setenv("LLMKERNEL_ACTIVATIONS", "float32")
        logits = decoded(model, ids, monkeypatch=monkeypatch)
        monkeypatch.delenv("LLMKERNEL_ACTIVATIONS")
    else:
        with library.floating_activations():
            logits = decoded(model, ids, monkeypatch=monkeypatch)
    assert len(native_calls) == 6
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    rounded = decoded(model, ids, monkeypatch=monkeypatch)
    assert (rounded - expected).norm() > 1e-3 * expected.norm()  # and rounds again


def read(model, ids, native=True, monkeypatch=None, **options) -> tuple[torch.Tensor, DynamicCache]:
    """Logits of a prompt and the cache that it leaves; without `native`, torch's and native linears'."""
    cache = options.pop("past_key_values", None) or DynamicCache(config=model.config)
    with monkeypatch.context() as patch:
        if not native:
            patch.setattr(step, "_is_step", lambda *arguments: False)
        return model(ids, past_key_values=cache, use_cache=True, **options).logits, cache


@pytest.mark.parametrize("kinds", [["full_attention"] * 3, ["sliding_attention", "full_attention"] * 2])
@pytest.mark.parametrize("head_dim", [10, 80])
def test_a_long_prompt_is_torchs_forward(level, kinds, head_dim, native_calls, monkeypatch):
    """Several runs of rows, tiles of queries and of keys, windows that end within them, and heads of odd widths."""
    model = random_model(sliding_window=70, layer_types=kinds, num_hidden_layers=len(kinds), head_dim=head_dim)
    ids = prompt(5, 210)
    expected, torchs = read(model, ids, native=False, monkeypatch=monkeypatch)
    logits, cache = read(model, ids, monkeypatch=monkeypatch)
    assert len(native_calls) == 1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for layer, other in zip(cache.layers, torchs.layers, strict=True):
        assert layer.get_seq_length() == 210
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)


def test_a_call_makes_its_own_cache(native_calls):
    model, ids = random_model(), prompt(2, 9)
    output = model(ids)
    assert len(native_calls) == 1 and output.past_key_values.get_seq_length() == 9
    without = model(ids, use_cache=False)
    assert len(native_calls) == 1 and without.past_key_values is None
    torch.testing.assert_close(output.logits, without.logits, rtol=1e-4, atol=1e-4)


def test_logits_of_the_last_tokens(native_calls, monkeypatch):
    model, ids = random_model(), prompt(3, 250)  # in runs of 170 tokens each
    expected, _ = read(model, ids, native=False, monkeypatch=monkeypatch)
    for kept in (1, 79, 80, 81, 400):
        logits, _ = read(model, ids, monkeypatch=monkeypatch, logits_to_keep=kept)
        torch.testing.assert_close(logits, expected[:, -kept:], rtol=1e-4, atol=1e-4)
    assert len(native_calls) == 5


@pytest.mark.parametrize("pad", [0, 5])
def test_a_prompt_in_pieces(pad, native_calls, monkeypatch):
    """Pieces of one token and of many after each other, behind windows that have let tokens go, and behind padding."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model, ids = random_model(sliding_window=8, layer_types=kinds), prompt(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {"attention_mask": mask, "position_ids": positions}
    expected, _ = read(model, ids, native=False, monkeypatch=monkeypatch, **options)
    cache, pieces = DynamicCache(config=model.config), []
    for begin, end in ((0, 11), (11, 12), (12, 15), (15, 16), (16, 40)):
        options = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end], "past_key_values": cache}
        pieces.append(read(model, ids[:, begin:end], monkeypatch=monkeypatch, **options)[0])
    assert len(native_calls) == 5
    torch.testing.assert_close(torch.cat(pieces, 1)[:, pad:], expected[:, pad:], rtol=1e-4, atol=1e-4)


def test_more_sequences_than_a_step_takes(native_calls, monkeypatch):
    model, ids = random_model(**CONFIGS["mixed forms"]), prompt(21, 4)
    expected = decoded(model, ids, native=False, monkeypatch=monkeypatch)
    logits = decoded(model, ids, monkeypatch=monkeypatch)
    assert len(native_calls) == 6
    assert (logits - expected).norm() < 0.03 * expected.norm()


def test_padded_prompts(native_calls, monkeypatch):
    model, ids = random_model(), prompt(3, 9)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[2, :1] = 0
    expected = decoded(model, ids, mask=mask, native=False, monkeypatch=monkeypatch)
    logits = decoded(model, ids, mask=mask, monkeypatch=monkeypatch)
    assert len(native_calls) == 6
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kinds", [["sliding_attention"] * 3, ["full_attention", "sliding_attention"] * 2])
def test_windows(kinds, native_calls, monkeypatch):
    """Prompts shorter and longer than the window, and steps until the room has been filled more than once."""
    monkeypatch.setattr("hf_llmkernel.kernels.cache.LEAST_ROOM", 4)
    model = random_model(sliding_window=6, layer_types=kinds, num_hidden_layers=len(kinds))
    for length in (3, 9):
        native_calls.clear()
        expected = decoded(model, prompt(2, length), 20, native=False, monkeypatch=monkeypatch)
        logits = decoded(model, prompt(2, length), 20, monkeypatch=monkeypatch)
        assert len(native_calls) == 21
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_long_contexts_are_shared_out_among_threads(native_calls, monkeypatch):
    monkeypatch.setenv("LLMKERNEL_THREADS", "3")
    model = random_model(max_position_embeddings=1024)
    mask = torch.ones(2, 700, dtype=torch.long)
    mask[1, :200] = 0  # whole parts that are not seen
    expected = decoded(model, prompt(2, 700), mask=mask, native=False, monkeypatch=monkeypatch)
    logits = decoded(model, prompt(2, 700), mask=mask, monkeypatch=monkeypatch)
    assert len(native_calls) == 6
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_static_cache(native_calls, monkeypatch):
    model, ids = random_model(**CONFIGS["layers of their own"]), prompt(2, 9)
    expected = decoded(model, ids, native=False, monkeypatch=monkeypatch)
    cache = StaticCache(config=model.config, max_cache_len=32)
    logits = decoded(model, ids, cache=cache, monkeypatch=monkeypatch)
    assert len(native_calls) == 6
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert int(cache.get_seq_length(1)) == 14


@pytest.mark.parametrize("head_dim, length", [(10, 9), (10, 150), (80, 150)])
def test_bfloat16_stays_near_float32(level, head_dim, length, native_calls, monkeypatch):
    """Torch rounds to bf16 after every operation, a native call less often: it is the nearer one."""
    exact = random_model(initializer_range=0.1, head_dim=head_dim)
    half = copy.deepcopy(exact).bfloat16()
    ids = prompt(2, length)
    expected = decoded(exact, ids, native=False, monkeypatch=monkeypatch)
    torchs = decoded(half, ids, native=False, monkeypatch=monkeypatch).float()
    logits = decoded(half, ids, monkeypatch=monkeypatch)
    assert len(native_calls) == 6 and logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 1.1 * (torchs - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "sampling", "static"],
)
def test_generate_is_torchs(options, native_calls):
    model, ids = random_model(), prompt(1, 5)
    results = []
    for context in (True, False):
        torch.manual_seed(3)
        with disabled() if not context else torch.no_grad():
            results.append(model.generate(ids, max_new_tokens=12, pad_token_id=0, **options))
    assert native_calls
    assert torch.equal(*results)


def test_assisted_generation_takes_tokens_back(native_calls):
    model, ids = random_model(), prompt(1, 5)
    draft = copy.deepcopy(model)
    draft.lm_head.weight.data += 0.3 * torch.randn_like(draft.lm_head.weight)
    expected = model.generate(ids, max_new_tokens=16, pad_token_id=0)
    native_calls.clear()
    assert torch.equal(model.generate(ids, max_new_tokens=16, pad_token_id=0, assistant_model=draft), expected)
    assert native_calls


@pytest.mark.parametrize("fields", ["dense", "layers of their own", "int4", "sparse int8", "mixed forms", "windows"])
@pytest.mark.parametrize("length", [3, 150])
def test_few_tokens_have_the_bits_of_one_by_one(level, fields, length, native_calls, monkeypatch):
    """Also where the parts of the context that threads share out are others for the last token than for the first."""
    monkeypatch.setenv("LLMKERNEL_THREADS", "3")
    windows = {"sliding_window": 70, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    model = random_model(**CONFIGS.get(fields, windows), num_key_value_heads=1).bfloat16()
    ids, mask = prompt(2, length + 8), torch.ones(2, length + 8, dtype=torch.long)
    mask[1, :2] = 0
    for batch, new in ((1, 8), (1, 3), (2, 4)):
        caches = [model(ids[:batch, :length], attention_mask=mask[:batch, :length]).past_key_values for _ in range(2)]
        for cache in caches:
            cache.activate_past_recording()
        positions = torch.arange(length, length + new).expand(batch, -1)
        options = {"past_key_values": caches[0], "position_ids": positions}
        options["attention_mask"] = mask[:batch, : length + new]
        native_calls.clear()
        together = model(ids[:batch, length : length + new], **options).logits
        assert len(native_calls) == 1
        for index in range(length, length + new):
            seen = {"past_key_values": caches[1], "attention_mask": mask[:batch, : index + 1]}
            alone = model(ids[:batch, index : index + 1], position_ids=torch.full((batch, 1), index), **seen).logits
            assert torch.equal(alone[:, 0], together[:, index - length])
        for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
            assert layer.keys is other.keys is None or torch.equal(layer.keys, other.keys)
        caches[0].crop(-new)
        last = model(ids[:batch, length : length + new], logits_to_keep=2, **options).logits
        assert torch.equal(last, together[:, -2:])


def test_a_window_that_records_gives_tokens_back(native_calls, monkeypatch):
    model = random_model(sliding_window=6, layer_types=["full_attention", "sliding_attention", "sliding_attention"])
    ids = prompt(1, 30)
    for length in (3, 9):
        caches = [read(model, ids[:, :length], native, monkeypatch)[1] for native in (True, False)]
        native_calls.clear()
        for cache in caches:
            cache.activate_past_recording()
            read(model, ids[:, 12:17], cache is caches[0], monkeypatch, past_key_values=cache)
            read(model, ids[:, 20:24], cache is caches[0], monkeypatch, past_key_values=cache)
            cache.crop(-7)
        assert len(native_calls) == 2
        for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
            assert layer.get_seq_length() == length + 2
            torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)
    cache = read(model, ids, monkeypatch=monkeypatch)[1]
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


def step_is_native(model, native_calls, **options) -> bool:
    """Whether a second call, of one token, is a native one."""
    output = model(prompt(1, 4), use_cache=True)
    native_calls.clear()
    model(prompt(1, 1), past_key_values=output.past_key_values, **options)
    return bool(native_calls)


def test_what_a_step_cannot_give_is_torchs(native_calls):
    model = random_model()
    assert step_is_native(model, native_calls)
    assert not step_is_native(model, native_calls, output_hidden_states=True)
    assert not step_is_native(model, native_calls, output_attentions=True)
    assert not step_is_native(model, native_calls, labels=prompt(1, 1))
    with disabled():
        assert not step_is_native(model, native_calls)
    model.train()
    assert not step_is_native(model, native_calls)
    model.eval()
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *arguments: None)
    assert not step_is_native(model, native_calls)
    handle.remove()
    model.model.norm.weight.requires_grad_(True)
    assert not step_is_native(model, native_calls)
    with torch.no_grad():
        assert step_is_native(model, native_calls)
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU())
    with torch.no_grad():
        assert not step_is_native(model, native_calls)


def test_other_models_are_torchs(native_calls):
    random_model_made_outside = random_model()
    assert not step_is_native(random_model().half(), native_calls)
    assert not step_is_native(random_model(hidden_act="tanh"), native_calls)
    with torch.inference_mode():  # tensors without versions: edits would not be seen
        made_in_inference_mode = random_model()
        assert not step_is_native(made_in_inference_mode, native_calls)
        assert step_is_native(random_model_made_outside, native_calls)
    rotation = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not step_is_native(random_model(rope_parameters=rotation), native_calls)


def test_a_step_follows_changes_of_the_model(native_calls, monkeypatch):
    model, ids = random_model(**CONFIGS["int4"]), prompt(1, 6)

    def check() -> None:
        expected = decoded(model, ids, 2, native=False, monkeypatch=monkeypatch)
        native_calls.clear()
        assert (decoded(model, ids, 2, monkeypatch=monkeypatch) - expected).norm() < 0.05 * expected.norm()
        assert len(native_calls) == 3

    check()
    model.model.layers[0].self_attn.q_proj.values.data = model.model.layers[0].self_attn.q_proj.values.data.flip(0)
    check()
    model.model.layers[1].mlp.up_proj.scales.mul_(2)
    check()
    model.model.norm.weight.mul_(1.5)
    check()
    model.model.layers[2] = copy.deepcopy(model.model.layers[0])
    model.model.layers[2].self_attn.layer_idx = 2
    check()
    model.lm_head = nn.Linear(48, 61, bias=True).requires_grad_(False)
    check()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    model.requires_grad_(False)
    check()


def test_a_model_is_forgotten_with_its_plan():
    model = random_model()
    model.generate(prompt(1, 3), max_new_tokens=3, pad_token_id=0)
    assert model in step._plans
    reference, before = weakref.ref(model), len(step._plans)
    del model
    gc.collect()
    assert reference() is None and len(step._plans) < before


def test_layers_of_the_cache_are_what_they_replace(native_calls):
    model = random_model(sliding_window=6, layer_types=["full_attention", "sliding_attention", "full_attention"])
    cache = model.generate(prompt(2, 5), max_new_tokens=8, pad_token_id=0, return_dict_in_generate=True).past_key_values
    with disabled():
        expected = model.generate(prompt(2, 5), max_new_tokens=8, pad_token_id=0, return_dict_in_generate=True)
    assert [type(layer) for layer in cache.layers] == [RoomyLayer, RoomySlidingLayer, RoomyLayer]
    for layer, other in zip(cache.layers, expected.past_key_values.layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length()
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(cache)
    for layer in (cache.layers[0], expected.past_key_values.layers[0]):
        layer.crop(-3)
        layer.reorder_cache(torch.tensor([1, 1]))
        layer.batch_repeat_interleave(2)
    torch.testing.assert_close(cache.layers[0].keys, expected.past_key_values.layers[0].keys, rtol=1e-4, atol=1e-4)
    assert cache.layers[0].keys.shape == (4, 2, 9, 10)
    assert twin.layers[0].keys.shape == (2, 2, 12, 10)
    cache.layers[0].reset()
    assert cache.layers[0].get_seq_length() == 0


@pytest.mark.parametrize("kind", ["dynamic", "used", "static", "integer"])
@pytest.mark.parametrize("other", [{"num_key_value_heads": 4}, {"head_dim": 6}, {}])
def test_a_cache_of_another_shape_is_torchs_to_refuse(kind, other, native_calls):
    model, ids = random_model(), prompt(2, 3)
    makes = {"static": lambda config: StaticCache(config=config, max_cache_len=16), "integer": IntegerCache}
    maker = random_model(**other) if other else model
    cache = makes.get(kind, lambda config: DynamicCache(config=config))(maker.config)
    maker(ids[:1], past_key_values=cache, use_cache=True)
    if kind != "used":
        for layer in cache.layers:
            layer.addresses = None
    native_calls.clear()
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        model(ids, past_key_values=cache, use_cache=True)
    assert not native_calls


def test_options_that_are_tensors_are_torchs(native_calls):
    model, ids = random_model(), prompt(1, 4)
    expected = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True).logits
    given = {"past_key_values": DynamicCache(config=model.config), "cache_position": torch.arange(4)}
    logits = model(ids, use_cache=True, **given).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert native_calls == [1]


def test_autocast_is_torchs(native_calls):
    model, ids = random_model(**forms(bits=8)), prompt(1, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True).logits
    assert not native_calls and logits.dtype == torch.bfloat16


def test_two_models_in_two_threads(native_calls):
    from concurrent.futures import ThreadPoolExecutor

    models = [random_model(), random_model(**CONFIGS["int4"])]
    expected = [model.generate(prompt(1, 5), max_new_tokens=10, pad_token_id=0) for model in models]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            found = pool.map(lambda model: model.generate(prompt(1, 5), max_new_tokens=10, pad_token_id=0), models)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_token_beyond_the_vocabulary_is_an_error():
    model = random_model()
    cache = model(prompt(1, 3), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="not of the vocabulary"):
        model(torch.tensor([[61]]), past_key_values=cache)


def test_generate_leaves_torchs_threads_as_they_were(monkeypatch):
    monkeypatch.delenv("LLMKERNEL_THREADS", raising=False)
    model, before = random_model(), torch.get_num_threads()
    seen = []
    try:
        torch.set_num_threads(3)
        model.register_forward_hook(lambda *arguments: seen.append((torch.get_num_threads(), library.threads())))
        model.generate(prompt(1, 4), max_new_tokens=3, pad_token_id=0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    # After each native call one, for what `generate` does with the logits.
    assert seen == [(1, 3), (1, 3), (1, 3)]


def operators_of(model, ids, **options):
    """The operators of the graph that a compiled call traces, and its logits; a break of the graph is an error."""
    names = []

    def record(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    model.compile(backend=record, fullgraph=True)
    with torch.no_grad():
        return names, model(ids, **options).logits


def test_a_compiled_graph_has_the_native_linears(native_calls):
    """Dynamo meets nothing else of the kernels, which it could not trace."""
    model, ids = random_model(**CONFIGS["int4"]), prompt(1, 6)
    expected = model(ids, use_cache=False).logits
    native_calls.clear()
    names, logits = operators_of(model.train().eval(), ids, use_cache=False)  # which forgets what the call has kept
    assert torch.equal(logits, expected) and not native_calls
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert sum("llmkernel" in name for name in names) == len(packed) > 0


def test_what_is_compiled_without_kernels_and_what_is_exported_is_torchs(native_calls):
    model, ids = random_model(**CONFIGS["int4"]), prompt(1, 6)
    with disabled():
        expected = model(ids, use_cache=False).logits
        names, logits = operators_of(model, ids, use_cache=False)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert not any("llmkernel" in name for name in names) and not native_calls

    linear = next(module for module in model.modules() if isinstance(module, PackedLinear))
    linear.prepare()
    x = torch.randn(3, linear.in_features)
    exported = torch.export.export(linear, (x,))
    assert not any("llmkernel" in str(node.target) for node in exported.graph.nodes)
    with disabled():
        torch.testing.assert_close(exported.module()(x), linear(x), rtol=1e-5, atol=1e-5)
