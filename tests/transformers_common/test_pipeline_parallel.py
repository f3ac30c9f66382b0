"""Pipeline parallelism of transformers: two stages as two processes over gloo against the whole model in one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.distributed.configuration_utils import DistributedConfig

from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

from .library.distributed_testing_utils import _set_rank_device, run_distributed
from .model_testers import LLMKernelTester, PackedEmbeddingTester, PackedTester, ShapesTester, SkipsTester

pytestmark = pytest.mark.timeout(120)  # a stage that fails leaves the other waiting


class UnevenTester(LLMKernelTester):
    """One layer on the first stage, two on the second, and on each a window shorter than the text."""

    num_hidden_layers = 3
    beyond_shapes = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


class TiedPackedTester(LLMKernelTester):
    """An integer embedding that both stages hold, the second as its head."""

    beyond_shapes = {**PackedTester.beyond_shapes, "embed_tokens_form": {"bits": 8}, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    "tester", [UnevenTester, ShapesTester, SkipsTester, PackedTester, PackedEmbeddingTester, TiedPackedTester]
)
def test_two_stages_compute_what_one_process_does(tester, tmp_path):
    torch.manual_seed(0)
    config = tester().get_config()
    config.initializer_range = 0.3  # wide enough for a wrong position or mask to change tokens
    LLMKernelForCausalLM(config).save_pretrained(tmp_path)
    run_distributed(2)(compare_with_one_process)(tmp_path)


@torch.no_grad()
def logits(model: LLMKernelForCausalLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits `[B, T + 2, vocab_size]` of the inputs, and of two more tokens whose positions only the cache knows."""
    first = model(**inputs, use_cache=True)
    more = inputs["input_ids"][:, :2]
    attention_mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    second = model(input_ids=more, attention_mask=attention_mask, past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], dim=1)


def compare_with_one_process(rank: int, folder: Path) -> None:
    """Asserts equal logits, bit for bit, and equal greedy tokens, with padding and without."""
    _set_rank_device(rank)
    whole: Any = LLMKernelForCausalLM.from_pretrained(folder)
    stage: Any = LLMKernelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(pp_size=2))
    owned = range(1) if rank == 0 else range(1, len(whole.model.layers))
    held = [hasattr(layer, "attends") for layer in stage.model.layers]
    assert held == [index in owned for index in range(len(held))]

    torch.manual_seed(1)
    input_ids = torch.randint(3, whole.config.vocab_size, (2, 7))
    for padded in (0, 3):
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, :padded] = 0
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        assert torch.equal(logits(stage, inputs), logits(whole, inputs))
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(stage.generate(**inputs, **options), whole.generate(**inputs, **options))
