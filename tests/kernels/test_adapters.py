"""LoRA adapters of peft in native steps: the logits of peft's own forward, whatever is switched later."""

import pytest
import torch

from hf_llmkernel.kernels import disabled

from .test_step import CONFIGS, LINEARS, decoded, prompt, random_model

peft = pytest.importorskip("peft")
FORMS = ("dense", "biases", "not gated, GELU", "tied, QK norm", "int4", "int8", "sparse int8")


def adapted(name: str = "dense", targets=LINEARS, dtype=torch.float32, adapters=("default",), **settings):
    """A model of one of `CONFIGS` with random adapters beside its linears."""
    model = random_model(**CONFIGS[name]).to(dtype)
    present = {module for module, _ in model.named_modules()}
    targets = [target for target in targets if any(module.endswith(target) for module in present)]
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=targets, init_lora_weights=False, **settings)
    wrapped = peft.get_peft_model(model, config, adapter_name=adapters[0])
    for other in adapters[1:]:
        wrapped.add_adapter(other, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in (parameter for key, parameter in model.named_parameters() if "lora_" in key):
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval().requires_grad_(False)


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


@pytest.mark.parametrize(("batch", "length"), [(1, 3), (3, 9), (2, 40)])
@pytest.mark.parametrize("name", FORMS)
def test_a_step_is_pefts_forward(level, name, batch, length, native_calls, monkeypatch):
    model, ids = adapted(name).base_model.model, prompt(batch, length)
    expected = decoded(model, ids, native=False, monkeypatch=monkeypatch)
    assert not native_calls
    logits = decoded(model, ids, monkeypatch=monkeypatch)
    assert len(native_calls) == 6
    tolerance = 0.03 if '"bits"' in model.config.to_json_string() else 1e-5
    assert distance(logits, expected) < tolerance
    without = random_model(**CONFIGS[name])
    assert distance(logits, decoded(without, ids, monkeypatch=monkeypatch)) > 0.1


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "gate_proj"), ("down_proj",)])
def test_some_linears_alone(targets, native_calls, monkeypatch):
    model, ids = adapted(targets=targets).base_model.model, prompt(2, 30)
    expected = decoded(model, ids, native=False, monkeypatch=monkeypatch)
    assert distance(decoded(model, ids, monkeypatch=monkeypatch), expected) < 1e-5
    assert len(native_calls) == 6


def test_in_bf16(native_calls, monkeypatch):
    wrapped = adapted(dtype=torch.bfloat16)  # peft keeps its own weights in fp32
    model, ids = wrapped.base_model.model, prompt(2, 30)
    with disabled():
        expected = decoded(model.float(), ids, monkeypatch=monkeypatch)
    logits = decoded(model.bfloat16(), ids, monkeypatch=monkeypatch)
    assert len(native_calls) == 6 and distance(logits.float(), expected) < 0.03


@torch.no_grad()  # peft lets what it switches to train
def test_what_is_switched_takes_effect(native_calls, monkeypatch):
    """Each is compared with peft's own forward, and is another than before."""
    wrapped, ids = adapted(adapters=("one", "two")), prompt(1, 9)
    model = wrapped.base_model.model
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]

    def check(before: torch.Tensor | None, native: bool = True) -> torch.Tensor:
        native_calls.clear()
        logits = decoded(model, ids, monkeypatch=monkeypatch)
        assert len(native_calls) == 6 * native
        assert distance(logits, decoded(model, ids, native=False, monkeypatch=monkeypatch)) < 1e-5
        assert before is None or distance(logits, before) > 0.01
        return logits

    one = check(None)
    wrapped.set_adapter("two")
    two = check(one)
    wrapped.base_model.set_adapter(["one", "two"])
    both = check(two)
    with wrapped.disable_adapter():
        check(both)
    for layer in layers:
        layer.set_scale("one", 3.0)
    scaled = check(both)
    layers[0].lora_B["two"].weight.mul_(-2)
    edited = check(scaled)
    wrapped.merge_adapter()
    assert distance(check(None), edited) < 1e-4
    wrapped.unmerge_adapter()
    assert distance(check(None), edited) < 1e-4
    wrapped.delete_adapter("two")
    check(edited)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_more_than_two_matrices_is_torchs(settings, native_calls, monkeypatch):
    model, ids = adapted(targets=("q_proj",), **settings).base_model.model, prompt(1, 9)
    decoded(model, ids, monkeypatch=monkeypatch)
    assert not native_calls


def test_dropout_that_trains_is_torchs(native_calls, monkeypatch):
    model, ids = adapted(lora_dropout=0.5).base_model.model, prompt(1, 9)
    decoded(model, ids, monkeypatch=monkeypatch)
    assert len(native_calls) == 6
    native_calls.clear()
    model.train()
    model.training = False
    decoded(model, ids, monkeypatch=monkeypatch)
    assert not native_calls


def test_generate_writes_the_same(native_calls):
    wrapped, ids = adapted("biases"), prompt(2, 7)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with disabled():
        expected = wrapped.generate(input_ids=ids, **options)
    assert not native_calls
    assert torch.equal(wrapped.generate(input_ids=ids, **options), expected) and native_calls
