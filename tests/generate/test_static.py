"""A decoding step on a static cache is one graph, whatever has been decoded: what a TPU needs to compile once.

Not of sliding layers: transformers' cache of these branches on a Python integer.
"""

import pytest
import torch
from transformers import StaticCache

from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

FIELDS = {
    "dense": {},
    "packed": {
        "linear_forms": {
            "up_proj": {"bits": 8, "group_size": 16}, "q_proj": {"rank": 8}, "down_proj": {"sparsity": "2:4"}
        }
    },
    "skipped": {"per_layer_config": {0: {"skip": ["attention"]}}},
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
@torch.no_grad()
def test_decoding_compiles_once(name):
    torch.manual_seed(0)
    model = LLMKernelForCausalLM(
        LLMKernelConfig(
            vocab_size=96, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
            eos_token_id=None, **FIELDS[name],
        )  # fmt: skip
    ).eval()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    step = torch.compile(model, backend=count, fullgraph=True, dynamic=False)
    for length in (4, 7, 11):
        ids = torch.arange(5, 5 + 2 * length).view(2, length)
        cache = StaticCache(config=model.config, max_cache_len=32)
        chosen = [model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)]
        for place in range(length, length + 9):
            positions = torch.full((2, 1), place)
            logits = step(input_ids=chosen[-1], past_key_values=cache, position_ids=positions).logits
            chosen.append(logits[:, -1:].argmax(-1))
        expected = model.generate(ids, max_new_tokens=10, do_sample=False)[:, length:]
        assert torch.equal(torch.cat(chosen, 1), expected)
    assert len(graphs) == 1
