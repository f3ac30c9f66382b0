"""A tiny checkpoint of the family with a tokenizer of its own, and text to calibrate on."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

WORDS = [f"w{number}" for number in range(90)]
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["<unk>", *WORDS])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def save_tiny(folder, seed: int = 0, **fields) -> LLMKernelForCausalLM:
    """Writes a random tiny checkpoint with its tokenizer, and returns the model."""
    torch.manual_seed(seed)
    model = LLMKernelForCausalLM(LLMKernelConfig(**{**TINY, **fields})).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a mistake
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="package", autouse=True)
def exact_products():
    """References hold to fp32 precision, whatever the processor; runs that whole modules share, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny dense checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file of 200 documents of 50 words."""
    choose = random.Random(0)
    documents = [" ".join(choose.choices(WORDS, k=50)) for _ in range(200)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n\n".join(documents), encoding="utf-8")
    return file
