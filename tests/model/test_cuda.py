"""Layouts of CUDA: their numbers through emulated operators and torch's own on the CPU, their shapes without a GPU."""

from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from transformers import CompileConfig, StaticCache
from transformers.utils import logging

from hf_llmkernel.kernels import disabled
from hf_llmkernel.model import cuda_llm_kernel
from hf_llmkernel.model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from hf_llmkernel.model.cuda_llm_kernel import (
    Int4Weight,
    Int8Weight,
    TwoOfFourWeight,
    int4_weight,
    layout_kind,
    takes_layouts,
    two_of_four_weight,
)
from hf_llmkernel.model.linear_llm_kernel import PackedLinear, build_linear, largest_mask, pack_weight, unpack_codes
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

from .cuda_operators import fake_cuda, pretended_cuda

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
FORMS = {
    "int4": ({"bits": 4, "group_size": 32}, Int4Weight),
    "int4 in two rows of tiles": ({"bits": 4, "group_size": 64, "scale_dtype": "float32"}, Int4Weight),
    "int4 a row": ({"bits": 4, "bias": True}, Int4Weight),
    "int4 zeros": ({"bits": 4, "group_size": 96, "symmetric": False}, Int4Weight),
    "int4 floating zeros": (
        {"bits": 4, "group_size": 32, "symmetric": False, "zero_point_dtype": "float16"}, Int4Weight,
    ),
    "int4 2:4": ({"bits": 4, "group_size": 32, "sparsity": "2:4"}, Int4Weight),
    "int4 bitmask": ({"bits": 4, "group_size": 32, "sparsity": "bitmask", "nnz": 999}, Int4Weight),
    "int8": ({"bits": 8, "group_size": 32, "bias": True}, Int8Weight),
    "int8 a row": ({"bits": 8, "bias": True}, Int8Weight),
    "int8 zeros": ({"bits": 8, "group_size": 16, "symmetric": False, "zero_point_dtype": "float32"}, Int8Weight),
    "2:4": ({"sparsity": "2:4", "bias": True}, TwoOfFourWeight),
    "1:4": ({"sparsity": "1:4"}, TwoOfFourWeight),
    "int8 2:4": ({"sparsity": "2:4", "bits": 8, "group_size": 64}, TwoOfFourWeight),
}  # fmt: skip


def random_linear(out_features: int, in_features: int, form: LinearForm, dtype=torch.bfloat16) -> PackedLinear:
    torch.manual_seed(0)
    linear = build_linear(in_features, out_features, form).to(dtype).eval()
    weight = torch.randn(out_features, in_features)
    if form.sparsity is not None:
        weight = weight * largest_mask(weight, form)
    for name, tensor in pack_weight(weight.to(dtype) if form.bits == 16 else weight, form).items():
        linear.get_parameter(name).data.copy_(tensor) if name in ("values", "mask") else setattr(linear, name, tensor)
    if linear.bias is not None:
        torch.nn.init.normal_(linear.bias)
    return linear


def exact(linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    """`x Wᵀ + bias` in fp64, of the weight that the stored values stand for."""
    weight = linear.dense_weight(torch.float32).double()
    return F.linear(x.double(), weight, None if linear.bias is None else linear.bias.double())


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("shape", [(32, 192), (96, 64), (32, 128)])
@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_a_layout_multiplies_as_the_weight_it_stands_for(name, shape):
    fields, layout = FORMS[name]
    linear = random_linear(*shape, LinearForm(**fields))
    x = torch.randn(2, 3, shape[1]).bfloat16()
    with pretended_cuda(), disabled():
        actual = linear(x)
        assert isinstance(linear._derived[2], layout)
        assert actual.shape == (2, 3, shape[0]) and actual.dtype == torch.bfloat16
        # bf16 rounds scales, weights and outputs by up to 2^-9 each; a wrong order of codes would be 1.
        assert distance(actual, exact(linear, x)) < 0.006
        assert isinstance(linear._derived[2], layout)  # which the look at the dense weight did not displace
        assert torch.equal(linear(x.transpose(0, 1)), actual.transpose(0, 1))  # rows that do not lie together


@pytest.mark.parametrize(("out_features", "in_features"), [(20, 100), (8, 40), (33, 576)])
@pytest.mark.parametrize("fields", [{"group_size": 32}, {"group_size": 64, "symmetric": False}, {}])
@torch.no_grad()
def test_int4_of_odd_shapes_is_padded(out_features, in_features, fields):
    linear = random_linear(out_features, in_features, LinearForm(bits=4, **fields))
    x = torch.randn(5, in_features).bfloat16()
    with pretended_cuda(), disabled():
        assert distance(linear(x), exact(linear, x)) < 0.006
        assert isinstance(linear._derived[2], Int4Weight)


@pytest.mark.parametrize("name", [name for name in FORMS if name.startswith("int4")])
def test_int4_follows_the_convention_of_torch_on_the_cpu(name):
    """`_weight_int4pack_mm_for_cpu` shares scales and zeros with CUDA's product, its order of codes is another."""
    form = LinearForm(**FORMS[name][0])
    linear = random_linear(32, 192, form)
    x = torch.randn(5, 192).bfloat16()
    cpu = torch.ops.aten
    with mock.patch.object(cuda_llm_kernel, "int4_pack", lambda codes, _: codes):
        layout = int4_weight(
            unpack_codes(linear.stored(), form, 192), form, linear.scales, linear.stored().get("zero_points")
        )
    packed = cpu._convert_weight_to_int4pack_for_cpu(layout.packed.int(), 1)
    x = F.pad(x, (0, layout.packed.shape[1] - 192))
    actual = cpu._weight_int4pack_mm_for_cpu(x, packed, layout.group_size, layout.scales_and_zeros)
    bias = 0 if linear.bias is None else linear.bias
    assert distance(actual + bias, exact(linear, x[:, :192])) < 0.006


@torch.no_grad()
def test_zeros_of_sparse_int4_are_exact():
    linear = random_linear(32, 64, LinearForm(bits=4, group_size=32, sparsity="2:4"))
    with pretended_cuda(), disabled():
        weight = linear(torch.eye(64, dtype=torch.bfloat16)).t()
        assert torch.equal(weight == 0, linear.dense_weight(torch.float32) == 0)


@torch.no_grad()
def test_int8_a_row_is_torchs_own_product():
    linear = random_linear(24, 64, LinearForm(bits=8, scale_dtype="bfloat16"))
    x = torch.randn(5, 64).bfloat16()
    own = torch.ops.aten._weight_int8pack_mm(x, linear.values, linear.scales.flatten())
    layout = Int8Weight(linear.values, linear.scales, None)
    # Both round the sum to bf16, this one before the scale too.
    torch.testing.assert_close(layout.linear(x, None), own, rtol=2**-7, atol=1e-3)


@torch.no_grad()
def test_codes_behind_a_zero_point_with_a_fraction_keep_it():
    form = LinearForm(bits=8, group_size=32, symmetric=False, zero_point_dtype="float32")
    linear = random_linear(16, 32, form)
    linear.zero_points = linear.zero_points + 0.3
    with pretended_cuda(), disabled():
        weight = linear(torch.eye(32, dtype=torch.bfloat16)).t()
        torch.testing.assert_close(weight, linear.dense_weight(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_two_of_four_keeps_every_value(dtype):
    weight = random_linear(64, 128, LinearForm(sparsity="2:4"), dtype).dense_weight(dtype)
    with pretended_cuda():
        layout = two_of_four_weight(weight)
        assert isinstance(layout.weight, SparseSemiStructuredTensorCUTLASS)
        assert layout.weight.packed.shape == (64, 64)  # half of the columns
        assert torch.equal(layout.weight.to_dense(), weight)


@pytest.mark.parametrize(
    ("fields", "shape", "dtype", "kind"),
    [
        ({"bits": 4, "group_size": 64}, (32, 128), torch.bfloat16, "int4"),
        ({"bits": 4, "group_size": 64}, (32, 128), torch.float16, None),  # the product is bf16's alone
        ({"bits": 4, "group_size": 16}, (32, 128), torch.bfloat16, None),
        ({"bits": 4, "group_size": 512}, (32, 128), torch.bfloat16, "int4"),
        ({"bits": 4, "group_size": 32, "symmetric": False, "sparsity": "2:4"}, (32, 128), torch.bfloat16, "2:4"),
        ({"bits": 4, "group_size": 32, "sparsity": "2:4"}, (32, 128), torch.float16, "2:4"),
        ({"bits": 8, "group_size": 64}, (30, 128), torch.float32, "int8"),
        ({"bits": 8, "group_size": 48}, (32, 128), torch.bfloat16, None),  # a short last group
        ({"bits": 8, "sparsity": "bitmask", "nnz": 9}, (32, 128), torch.bfloat16, None),
        ({"sparsity": "2:4"}, (32, 128), torch.float32, None),
        ({"sparsity": "2:4"}, (48, 128), torch.bfloat16, None),
        ({"sparsity": "2:4"}, (32, 96), torch.bfloat16, None),
        ({"sparsity": "1:2"}, (32, 64), torch.bfloat16, "2:4"),
        ({"sparsity": "2:8"}, (32, 64), torch.bfloat16, "2:4"),
        ({"sparsity": "4:8"}, (32, 64), torch.bfloat16, None),  # four of which may lie together
        ({"sparsity": "2:6"}, (32, 64), torch.bfloat16, None),
        ({"sparsity": "bitmask", "nnz": 99}, (32, 64), torch.bfloat16, None),
    ],
)
def test_which_layout_serves(fields, shape, dtype, kind):
    assert layout_kind(LinearForm(**fields), *shape, dtype) == kind


@pytest.mark.parametrize(
    ("capability", "hip", "serves"), [((8, 0), None, True), ((7, 5), None, False), ((9, 4), "6", False)]
)
def test_which_devices_serve(capability, hip, serves):
    takes_layouts.cache_clear()
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        mock.patch.object(torch.version, "hip", hip),
    ):
        assert takes_layouts(torch.device("cuda", 0)) is serves
        assert takes_layouts(torch.device("cpu")) is False
    takes_layouts.cache_clear()


@torch.no_grad()
def test_the_cpu_keeps_its_own_way():
    linear = random_linear(32, 64, LinearForm(bits=4, group_size=32))
    x = torch.randn(3, 64).bfloat16()
    with disabled():
        linear.prepare()
        assert linear._derived is None
        assert torch.equal(linear(x), F.linear(x, linear.dense_weight(torch.bfloat16)))
        assert linear._derived[1] == torch.bfloat16


def test_gradients_come_back_through_the_dense_weight():
    linear = random_linear(32, 64, LinearForm(bits=4, group_size=32))
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    with pretended_cuda(), disabled():
        linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.dense_weight().sum(0).expand(3, 64), rtol=0.02, atol=0.02)


@torch.no_grad()
def test_a_long_prompt_is_multiplied_dense_and_leaves_the_layout():
    linear = random_linear(32, 64, LinearForm(bits=4, group_size=32))
    with pretended_cuda(), disabled():
        linear(torch.randn(1, 64).bfloat16())
        kept = linear._derived
        x = torch.randn(129, 64).bfloat16()
        assert torch.equal(linear(x), F.linear(x, linear.dense_weight(torch.bfloat16)))
        assert linear._derived is kept


MODEL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "dtype": "bfloat16",
}
EMBEDDING = {"embed_tokens_form": {"bits": 4, "group_size": 32}, "tie_word_embeddings": True}
BITMASK = {"sparsity": "bitmask", "nnz": 999}
MODELS = {
    **{name: ({"linear_forms": dict.fromkeys(("q_proj", "up_proj", "down_proj"), fields)}, layout)
       for name, (fields, layout) in FORMS.items()},
    "bitmask": ({"linear_forms": dict.fromkeys(("q_proj", "up_proj"), BITMASK)}, torch.Tensor),
    "low rank of int4": ({"linear_forms": {"up_proj": {"rank": 32, "a": {"bits": 4, "group_size": 32}}}}, Int4Weight),
    "tied embedding": ({**EMBEDDING, "linear_forms": {"up_proj": {"bits": 8, "group_size": 32}}}, Int8Weight),
}  # fmt: skip


def random_model(name: str, device: str = "cpu") -> LLMKernelForCausalLM:
    torch.manual_seed(0)
    config = LLMKernelConfig(**MODEL, **MODELS[name][0])
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LLMKernelForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def kept_by(model: LLMKernelForCausalLM) -> set[type]:
    return {type(module._derived[2]) for module in model.modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_on_a_gpu_without_values_has_its_shapes(name):
    """Every operator meets tensors of one device alone, of types and shapes that it takes."""
    model = random_model(name, "meta")
    with fake_cuda(model):
        cache = StaticCache(config=model.config, max_cache_len=16)
        ids = torch.zeros(2, 5, dtype=torch.long, device="cuda")
        for given in (ids, ids[:, :1]):
            logits = model(given, past_key_values=cache).logits
            assert logits.shape == (*given.shape, 96) and logits.dtype == torch.bfloat16
            assert logits.device == torch.device("cuda", 0)
        layout = MODELS[name][1]
        assert all(issubclass(kind, (layout, Int4Weight)) for kind in kept_by(model))


@pytest.mark.parametrize(("name", "warns"), [("bitmask", True), ("int4", False)])
@torch.no_grad()
def test_a_form_without_a_product_there_is_reported_once_with_the_export(name, warns, caplog):
    logging.get_logger("hf_llmkernel").warning_once.cache_clear()
    model = random_model(name, "meta")
    with fake_cuda(model), caplog.at_level("WARNING"):
        for _ in range(2):
            model(torch.zeros(1, 2, dtype=torch.long, device="cuda"), use_cache=False)
    reported = [record.message for record in caplog.records if "--to compressed-tensors" in record.message]
    assert len(reported) == warns


@pytest.mark.parametrize("name", ["int4", "int4 2:4", "int8", "2:4", "bitmask", "low rank of int4", "tied embedding"])
@torch.no_grad()
def test_a_decoding_step_is_one_graph_of_prepared_weights(name):
    model = random_model(name)
    ids = torch.arange(5, 11).view(2, 3)
    graphs, moving = [], set()

    def count(graph, inputs):
        graphs.append(graph)
        moving.update(tuple(given.shape) for given in inputs if not hasattr(given, "_dynamo_static_input_type"))
        return graph

    with pretended_cuda(), disabled():
        expected = model(torch.cat((ids, ids), 1), use_cache=False).logits[:, 3:]
        model.train().eval()  # forgets what it has kept
        torch._dynamo.reset()
        step = model.get_compiled_call(CompileConfig(backend=count, fullgraph=True, dynamic=False, mode=None))
        assert len(kept_by(model)) in (1, 2)  # before anything has run
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids, past_key_values=cache)
        for place in range(3):
            positions = torch.full((2, 1), 3 + place)
            logits = step(input_ids=ids[:, place : place + 1], past_key_values=cache, position_ids=positions).logits
            assert distance(logits[:, 0], expected[:, place]) < 0.03  # bf16, in sums of another order
    assert len(graphs) == 1
    called = {str(node.target) for node in graphs[0].graph.nodes if node.op in ("call_function", "call_method")}
    assert not any("convert_weight_to_int4pack" in name or "masked_scatter" in name for name in called)
    assert moving == {(2, 1)}  # ids and positions: CUDA graphs copy what is not marked static at every token


@torch.no_grad()
def test_new_weights_reach_a_graph():
    linear, other = (random_linear(32, 64, LinearForm(bits=4, group_size=32)) for _ in range(2))
    other.scales = other.scales * 2
    x = torch.randn(1, 64).bfloat16()
    with pretended_cuda(), disabled():
        linear.prepare()
        graph = torch.compile(linear, backend="eager", fullgraph=True)
        before = graph(x)
        linear.load_state_dict(other.state_dict())
        torch.testing.assert_close(graph(x), 2 * before, rtol=0.02, atol=0.02)
