"""Tiny random models of Llama and of this family, with a tokenizer of one token a byte, saved as folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM

SHAPE = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
FORMS = {
    "q_proj": {"bits": 8, "group_size": 16},
    "k_proj": {"sparsity": "2:4", "bits": 4},
    "v_proj": {"rank": 4, "a": {"bits": 8}, "b": {"sparsity": "bitmask", "nnz": 30}},
    "o_proj": {"sparsity": "bitmask", "nnz": 500},
    "up_proj": {"rank": 8},
    "down_proj": {"bits": 4, "group_size": 16, "symmetric": False},
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=8, initializer_range=0.2)).eval()


@pytest.fixture(scope="session")
def compressed() -> LLMKernelForCausalLM:
    torch.manual_seed(1)
    config = LLMKernelConfig(
        **SHAPE,
        head_dim=8,
        linear_forms=FORMS,
        embed_tokens_form={"bits": 8, "group_size": 16},
        per_layer_config={1: {"intermediate_size": 48, "linear_forms": {}}, 2: {"skip": ["attention"]}},
    )
    return LLMKernelForCausalLM(config).eval()


@pytest.fixture(scope="session")
def saved(tmp_path_factory, llama, compressed, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("llama", llama), ("compressed", compressed)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def llama_folder(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved / "llama", tmp_path / "llama"))


@pytest.fixture
def compressed_folder(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved / "compressed", tmp_path / "compressed"))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "articles.jsonl"
    articles = [f"Article {number}: of {number} things, {number % 7} are {number**2}." * 3 for number in range(80)]
    path.write_text("".join(json.dumps({"text": article}) + "\n" for article in articles))
    return path


def edit_config(folder: Path, **changes) -> None:
    """Changes fields of a `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
