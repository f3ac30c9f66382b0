"""Sequences packed by `DataCollatorWithFlattening`: each token as if its sequence stood alone.

Without a cache, as Trainer runs: transformers looks for packed positions only then, in every family.
"""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM
from hf_llmkernel.presets import preset_config

LENGTHS = (5, 1, 17, 9)
FORMS = {
    "dense": {},
    "packed": {"q_proj": {"bits": 8}, "up_proj": {"sparsity": "2:4"}, "down_proj": {"rank": 16, "a": {"bits": 4}}},
}


def build(attention: str, forms: str, **overrides) -> LLMKernelForCausalLM:
    torch.manual_seed(0)
    overrides |= {"num_hidden_layers": 2, "linear_forms": FORMS[forms], "initializer_range": 0.2, "use_cache": False}
    config = preset_config("tiny", **overrides)
    return LLMKernelForCausalLM._from_config(config, attn_implementation=attention).eval()


def sequences() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 4096, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_those_of_each_sequence_alone(attention: str, window: int | None, forms: str) -> None:
    model = build(attention, forms, sliding_window=window)
    batch = DataCollatorWithFlattening(return_tensors="pt")(sequences())
    assert batch["input_ids"].shape == (1, sum(LENGTHS)) and "attention_mask" not in batch
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits[0] for row in sequences()])
    assert alone.std() > 0.1
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


def test_loss_and_gradients_are_those_of_the_sequences() -> None:
    model = build("sdpa", "dense").train()
    batch = DataCollatorWithFlattening(return_tensors="pt")(sequences())
    model(**batch).loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    targets = sum(length - 1 for length in LENGTHS)
    for row in sequences():
        ids = torch.tensor([row["input_ids"]])
        if ids.shape[1] > 1:  # one token predicts nothing
            model(input_ids=ids, labels=ids, num_items_in_batch=targets).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-6, rtol=1e-4)
