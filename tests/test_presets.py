"""Presets have the shapes their names promise, counted without the model's own arithmetic."""

import pytest
import torch

from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM
from hf_llmkernel.presets import PRESETS, preset_config

# Published sizes where there are any: SmolLM2-135M, TinyLlama-1.1B, Llama-2-7B and Llama-2-70B, from their model cards.
PUBLISHED = {"135m": 134_515_008, "1b": 1_100_048_384, "7b": 6_738_415_616, "70b": 68_976_648_192}


def meta_model(name: str, **overrides) -> LLMKernelForCausalLM:
    with torch.device("meta"):
        return LLMKernelForCausalLM(preset_config(name, **overrides))


def counted(name: str) -> int:
    return sum(parameter.numel() for parameter in meta_model(name).parameters())  # a tied head is counted once


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_count(name: str) -> None:
    assert counted(name) == PUBLISHED[name]


def test_article_is_one_relu_block_of_its_widths() -> None:
    attention = 4 * 512 * 512  # 8 heads of 64
    feed_forward = 512 * 2048 + 2048 + 2048 * 512 + 512  # W1 b1 W2 b2
    norms = 3 * 512
    assert counted("article") == 10000 * 512 + attention + feed_forward + norms + 512 * 10000
    article = meta_model("article")
    kinds = {type(module).__name__ for module in article.modules()}
    assert "ReLU" in kinds and not any("gate_proj" in name for name, _ in article.named_parameters())
    assert article.config.head_dim == 64


def test_tiny_is_a_toy_with_every_default_feature() -> None:
    layer = 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 384 + 2 * 128
    assert counted("tiny") == 4096 * 128 + 4 * layer + 128
    assert counted("tiny") < 5_000_000


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_forward_on_meta(name: str) -> None:
    model = meta_model(name, num_hidden_layers=1)
    logits = model(torch.zeros(2, 3, dtype=torch.long, device="meta")).logits
    assert logits.shape == (2, 3, model.config.vocab_size)


def test_overrides_replace_the_preset() -> None:
    config = preset_config("tiny", vocab_size=99, num_attention_heads=8, num_key_value_heads=None)
    assert (config.vocab_size, config.head_dim, config.num_key_value_heads) == (99, 16, 8)
    assert preset_config("tiny").vocab_size == 4096


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"preset='2b': unknown; choose one of \['135m'.*'tiny'\]"):
        preset_config("2b")
