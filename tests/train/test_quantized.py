"""QLoRA on bitsandbytes weights (Dettmers et al. 2023, arXiv 2305.14314) on a CPU: trained, saved, merged back."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from hf_llmkernel.model.checks_llm_kernel import quantized_linears
from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

SETTINGS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
# Of the low-rank down_proj in layer 0 both factors as one linear, and where that cannot be merged into, its second.
TARGETS = ["q_proj", "down_proj"]
MERGED = ["q_proj", "down_proj.b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a low-rank linear and layers of different widths."""
    torch.manual_seed(0)
    config = LLMKernelConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        linear_forms={"down_proj": {"rank": 64}},
        per_layer_config={1: {"intermediate_size": 192, "linear_forms": {}}},
    )
    folder = tmp_path_factory.mktemp("float")
    LLMKernelForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder, setting):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**SETTINGS[setting]))


def adapted(model, targets=TARGETS):
    torch.manual_seed(1)
    model = peft.prepare_model_for_kbit_training(model)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.0))


ROWS = [{"input_ids": row, "labels": row} for row in (torch.arange(16).repeat(16, 1) * 3 % 64).clone()]


def train(model, output, optimizer="adamw_torch", steps=6):
    arguments = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        optim=optimizer,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run(model):
    with torch.no_grad():
        return model(input_ids=ROWS[0]["input_ids"][None]).logits


def codes(model):
    return {name: linear.weight.data.clone() for name, linear in quantized_linears(model).items()}


@pytest.mark.parametrize("setting", SETTINGS)
def test_adapters_train_and_the_weights_under_them_stay_as_they_were(folder, tmp_path, setting):
    model = load(folder, setting)
    run(model)  # evaluated before, as in the middle of a training
    before = codes(model)
    adapter = adapted(model)
    losses = train(adapter, tmp_path)
    assert losses[-1] < losses[0] - 0.5
    run(adapter.eval())
    after = codes(adapter)
    assert len(after) == len(before) == 15
    assert all(torch.equal(one, other) for one, other in zip(before.values(), after.values(), strict=True))
    adapter.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder, setting), tmp_path / "adapter")
    torch.testing.assert_close(run(again.eval()), run(adapter), rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_of_bitsandbytes_train_as_torch_does(folder, tmp_path, optimizer):
    expected = train(adapted(load(folder, "nf4")), tmp_path)
    losses = train(adapted(load(folder, "nf4")), tmp_path, optimizer)
    assert losses == pytest.approx(expected, abs=0.05)
    assert losses[-1] < losses[0] - 0.5


def quantized_again(linear, update, setting):
    """Codes and scales of a quantized weight and what is added to it."""
    functional, weight = bitsandbytes.functional, linear.weight
    if setting == "int8":
        scales = weight.SCB if linear.state.SCB is None else linear.state.SCB
        exact = weight.data * scales[:, None] * (1 / 127) + update
        return functional.int8_vectorwise_quant(exact.half())[:2]
    exact = functional.dequantize_4bit(weight.data, copy.deepcopy(weight.quant_state)) + update
    packed, state = functional.quantize_4bit(exact, quant_type="nf4", compress_statistics=setting == "nf4 double")
    return packed, state.absmax


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("evaluated", [False, True])
def test_merged_weights_are_the_decoded_ones_and_the_update_quantized_again(folder, tmp_path, setting, evaluated):
    adapter = adapted(load(folder, setting), MERGED)
    train(adapter, tmp_path, steps=2)
    layers = {n: m for n, m in adapter.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    expected = {}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        expected[name.removeprefix("base_model.model.")] = quantized_again(base, update.detach(), setting)
    if evaluated:
        run(adapter.eval())
    merged = adapter.merge_and_unload()
    run(merged.eval())
    merged.save_pretrained(tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert len(expected) == 3
    for name, (packed, scales) in expected.items():
        assert torch.equal(stored[f"{name}.weight"], packed)
        assert torch.equal(stored[f"{name}.SCB" if setting == "int8" else f"{name}.weight.absmax"], scales)
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), run(merged))


def test_merged_into_the_dequantized_model_nothing_is_rounded_again(folder, tmp_path):
    adapter = adapted(load(folder, "nf4"), MERGED)
    train(adapter, tmp_path, steps=2)
    adapter.save_pretrained(tmp_path / "adapter")
    run(adapter.eval())
    plain = peft.PeftModel.from_pretrained(load(folder, "nf4").dequantize(), tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(run(plain), run(adapter), rtol=0, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), run(plain))


@pytest.mark.parametrize("setting", ["int8", "nf4"])
def test_training_without_adapters_is_refused(folder, tmp_path, setting):
    with pytest.raises(ValueError, match="attach trainable adapters"):
        train(load(folder, setting), tmp_path)
