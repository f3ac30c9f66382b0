"""Pushes a model of every class, and a tokenizer, to the Hub of the environment; run with the package.

python push_worker.py output.pt     writes {repository: outputs of the model} and the tokens that continue a prompt
"""

import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_llmkernel.model import modeling_llm_kernel as modeling
from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig
from tests.model.clean_process_worker import compute

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "how vexingly quick"]
REPOSITORIES = {
    "loopback/causal": modeling.LLMKernelForCausalLM,
    "loopback/body": modeling.LLMKernelModel,
    "loopback/sequence": modeling.LLMKernelForSequenceClassification,
    "loopback/token": modeling.LLMKernelForTokenClassification,
    "loopback/question": modeling.LLMKernelForQuestionAnswering,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=90, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def compressed_config(vocab_size: int) -> LLMKernelConfig:
    """int8, 2:4 and low rank side by side, layers of different widths, int4 embeddings that the head shares."""
    low_rank = {"rank": 6, "a": {"bits": 8}, "b": {"sparsity": "2:4", "bits": 4, "group_size": 4}}
    layers = {
        0: {"intermediate_size": 40, "linear_forms": {"q_proj": {"bits": 8}, "down_proj": {"sparsity": "2:4"}}},
        2: {"num_attention_heads": 2, "linear_forms": {"up_proj": low_rank, "o_proj": low_rank | {"b": None}}},
    }
    return LLMKernelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        num_labels=3,
        dtype=torch.float32,
        tie_word_embeddings=True,
        embed_tokens_form={"bits": 4, "group_size": 16},
        linear_forms={"v_proj": {"sparsity": "bitmask", "nnz": 200, "bits": 8}},
        per_layer_config=layers,
    )


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    pushed: dict = {"outputs": {}}
    for repository, model_class in REPOSITORIES.items():
        model = model_class(compressed_config(len(tokenizer))).eval()
        pushed["outputs"][repository] = compute(model)
        model.push_to_hub(repository)
        tokenizer.push_to_hub(repository)
        if isinstance(model, modeling.LLMKernelForCausalLM):
            inputs = tokenizer("the quick", return_tensors="pt", return_token_type_ids=False)
            pushed["continued"] = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    torch.save(pushed, sys.argv[1])


if __name__ == "__main__":
    main()
