"""Integer forms under `Trainer`: adapters and heads train, whatever else would change is refused before it does."""

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM, LLMKernelForSequenceClassification

IDS = torch.arange(16).repeat(16, 1) * 3 % 64
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
LABELLED = [{"input_ids": row, "labels": number % 2} for number, row in enumerate(IDS)]


def build(kind):
    torch.manual_seed(0)
    config = LLMKernelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        linear_forms={"down_proj": {"bits": 8, "group_size": 16}, "q_proj": {"rank": 8, "b": {"bits": 8}}},
    )
    return kind(config)


def trainer(model, folder, rows):
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_weights_around_integers_are_not_trained(tmp_path):
    model = build(LLMKernelForCausalLM)
    before, training = copied(model), trainer(model, tmp_path, ROWS)
    assert training.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"^layers.0.self_attn.q_proj.b: stores integers, .*; attach adapters \(pe"):
        training.train()
    assert not changed(model, before)


def test_adapters_train(tmp_path):
    targets = peft.LoraConfig(r=4, target_modules=["down_proj", "v_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(build(LLMKernelForCausalLM), targets)
    before = copied(model)
    trainer(model, tmp_path, ROWS).train()
    assert changed(model, before) and all("lora_" in name for name in changed(model, before))


def test_a_head_trains_on_a_body_that_is_frozen(tmp_path):
    model = build(LLMKernelForSequenceClassification)
    model.base_model.requires_grad_(False)
    before = copied(model)
    trainer(model, tmp_path, LABELLED).train()
    assert changed(model, before) == {"score.weight"}
