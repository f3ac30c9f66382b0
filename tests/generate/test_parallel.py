"""Tensor parallelism on two processes, as `torchrun` starts them: the tokens of one, or a refusal by name."""

import json
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from transformers import AutoModelForCausalLM

from hf_llmkernel.model.checks_llm_kernel import refuse_uneven_heads
from hf_llmkernel.model.configuration_llm_kernel import ATTENTION_LINEARS, MLP_LINEARS, LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

pytestmark = pytest.mark.timeout(120)  # a process that fails leaves the other waiting
FORMS = {
    "dense": {},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "low rank": {"linear_forms": {name: {"rank": 16} for name in ATTENTION_LINEARS + MLP_LINEARS}},
    "uneven": {"per_layer_config": {0: {"intermediate_size": 96, "linear_forms": {"up_proj": {"rank": 24}}}}},
    "odd widths": {"intermediate_size": 97, "vocab_size": 95, "linear_forms": {"down_proj": {"rank": 15}}},
    "skipped": {"per_layer_config": {0: {"skip": ["attention"]}}, "num_hidden_layers": 3},
}
PACKED = {"int8": {"bits": 8, "group_size": 16}, "2:4": {"sparsity": "2:4"}, "factor": {"rank": 16, "a": {"bits": 8}}}
UNEVEN = {
    "nine heads": (
        {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16},
        ("layer 0 has num_attention_heads=9 and num_key_value_heads=3", "start 3 processes, or use"),
    ),
    "twelve heads and a layer of nine": (
        {
            "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 16,
            "per_layer_config": {1: {"num_attention_heads": 9, "num_key_value_heads": 9}},
        },
        ("layer 1 has num_attention_heads=9 and num_key_value_heads=9", "start 3 processes, or use"),
    ),
    "a layer of one": (
        {"per_layer_config": {0: {"num_attention_heads": 3, "num_key_value_heads": 1}}},
        ("layer 0 has num_attention_heads=3 and num_key_value_heads=1", "no number of them does; use"),
    ),
}  # fmt: skip
IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each of the forms, and of each of the packed ones."""
    folder = tmp_path_factory.mktemp("models")
    packed = {name: {"linear_forms": {"up_proj": form}} for name, form in PACKED.items()}
    uneven = {name: fields for name, (fields, _) in UNEVEN.items()}
    for name, fields in {**FORMS, **packed, **uneven}.items():
        torch.manual_seed(0)
        shape = {
            "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
        }  # fmt: skip
        LLMKernelForCausalLM(LLMKernelConfig(**{**shape, **fields})).save_pretrained(folder / name)
    return folder


def tokens(model) -> list[list[int]]:
    return model.generate(IDS, max_new_tokens=12, do_sample=False)[:, IDS.shape[1] :].tolist()


def _serve(rank: int, port: int, folders) -> None:
    """Loads every checkpoint split in two and writes its tokens, the rows of an up_proj here, or its refusal."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    os.environ["MASTER_PORT"] = str(port)
    found = {}
    for name in (*FORMS, *PACKED, *UNEVEN):
        try:
            model = AutoModelForCausalLM.from_pretrained(folders / name, tp_plan="auto")
        except ValueError as error:
            found[name] = str(error)
        else:
            weight = next(iter(model.model.layers[-1].mlp.up_proj.parameters()))
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            found[name] = {"tokens": tokens(model), "shape": list(local.shape)}
    (folders / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(folders):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(_serve, (port, folders), 2, start_method="fork")
    return [json.loads((folders / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", FORMS)
def test_two_processes_generate_the_tokens_of_one(folders, found, name):
    expected = tokens(AutoModelForCausalLM.from_pretrained(folders / name))
    assert len({token for row in expected for token in row}) > 4
    assert [rank[name]["tokens"] for rank in found] == [expected, expected]
    shapes = {"low rank": [[16, 64]] * 2, "odd widths": [[49, 64], [48, 64]]}.get(name, [[64, 64]] * 2)
    assert [rank[name]["shape"] for rank in found] == shapes


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_form_is_refused_by_name(found, name):
    for rank in found:
        assert rank[name].startswith("tensor parallelism: layers.0.up_proj is stored sparse or integer, a form without")


@pytest.mark.parametrize("name", UNEVEN)
def test_heads_that_the_processes_cannot_share_are_refused(found, name):
    for rank in found:
        layer, remedy = UNEVEN[name][1]
        assert rank[name].startswith(f"tensor parallelism: {layer}, which 2 processes cannot share evenly; {remedy}")


def test_a_plan_of_ones_own_for_attention_is_its_authors():
    config = LLMKernelConfig(**UNEVEN["nine heads"][0])
    refuse_uneven_heads(config, 2, {"layers.*.self_attn.q_proj": "replicated"})
    with pytest.raises(ValueError, match="layer 0 has num_attention_heads=9"):
        refuse_uneven_heads(config, 2, {"lm_head": "colwise"})
