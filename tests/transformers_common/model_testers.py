"""Small configurations of the family and their inputs, as transformers' common tests ask a model tester for them."""

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedConfig,
)

from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import (
    LLMKernelForCausalLM,
    LLMKernelForQuestionAnswering,
    LLMKernelForSequenceClassification,
    LLMKernelForTokenClassification,
    LLMKernelModel,
)


class LLMKernelTester:
    """Every layer alike, every linear dense: the shapes of transformers' own decoder tests."""

    batch_size = 13
    seq_length = 7
    is_training = True
    vocab_size = 99
    hidden_size = 32
    intermediate_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2
    num_key_value_heads = 2
    pad_token_id = 0

    config_class: type[PreTrainedConfig] = LLMKernelConfig
    base_model_class = LLMKernelModel
    causal_lm_class = LLMKernelForCausalLM
    sequence_classification_class = LLMKernelForSequenceClassification
    token_classification_class = LLMKernelForTokenClassification
    question_answering_class = LLMKernelForQuestionAnswering

    beyond_shapes: dict[str, Any] = {}

    @property
    def model_classes(self) -> tuple[type, ...]:
        heads = (self.sequence_classification_class, self.token_classification_class, self.question_answering_class)
        return (self.base_model_class, self.causal_lm_class, *heads)

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=512,
            pad_token_id=self.pad_token_id,
            **self.beyond_shapes,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril()}


class ShapesTester(LLMKernelTester):
    """Layers of different width, heads and rank, each linear low-rank in one layer and dense in the other."""

    beyond_shapes = {
        "attention_bias": True,
        "attention_out_bias": False,
        "qk_norm": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "per_layer_config": {
            "0": {"intermediate_size": 48, "linear_forms": {"q_proj": {"rank": 8}, "down_proj": {"rank": 6}}},
            "1": {
                "intermediate_size": 16,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "linear_forms": {"k_proj": {"rank": 8}, "o_proj": {"rank": 8}, "up_proj": {"rank": 6}},
            },
        },
    }


class SkipsTester(LLMKernelTester):
    """A first layer without attention and a second without feed-forward, their linears partly low-rank."""

    attending_layers = 1
    heads_of_the_attending = 4
    beyond_shapes = {
        "per_layer_config": {
            "0": {"skip": ["attention"], "intermediate_size": 48, "linear_forms": {"gate_proj": {"rank": 8}}},
            "1": {
                "skip": ["mlp"],
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "linear_forms": {"o_proj": {"rank": 8}},
            },
        },
    }


class PackedTester(LLMKernelTester):
    """Integer and sparse linears, and both at once inside a low rank."""

    beyond_shapes = {
        "linear_forms": {
            "q_proj": {"bits": 8, "group_size": 16},
            "o_proj": {"bits": 4, "symmetric": False},
            "gate_proj": {"sparsity": "2:4"},
            "up_proj": {"sparsity": "bitmask", "nnz": 500},
            "down_proj": {"rank": 8, "a": {"bits": 8}, "b": {"sparsity": "2:4", "bits": 4}},
        },
    }


class PackedEmbeddingTester(LLMKernelTester):
    """Embedding and head stored as integers, beside what `PackedTester` has."""

    beyond_shapes = {
        **PackedTester.beyond_shapes,
        "embed_tokens_form": {"bits": 8},
        "lm_head_form": {"bits": 4, "group_size": 16},
    }


class LlamaTester(LLMKernelTester):
    """The library's own Llama, what the family is held against in the run by hand."""

    config_class = LlamaConfig
    base_model_class = LlamaModel
    causal_lm_class = LlamaForCausalLM
    sequence_classification_class = LlamaForSequenceClassification
    token_classification_class = LlamaForTokenClassification
    question_answering_class = LlamaForQuestionAnswering
