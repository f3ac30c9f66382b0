"""The quantize stage: which linears it takes, and what a block holds afterwards."""

import copy

import pytest
import torch

from hf_llmkernel.compress.block import SITES, Block, module_path
from hf_llmkernel.compress.inputs import InputStatistic
from hf_llmkernel.compress.quantize.coordinate_descent import coordinate_descent
from hf_llmkernel.compress.quantize.gptq import gptq
from hf_llmkernel.compress.quantize.stage import Quantize
from hf_llmkernel.model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from hf_llmkernel.model.linear_llm_kernel import unpack_weight
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelDecoderLayer

from ..conftest import TINY


@pytest.fixture
def block():
    config = LLMKernelConfig(**TINY, attention_bias=True)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    tensors = LLMKernelDecoderLayer(config, 0).state_dict()
    return Block(0, copy.deepcopy(config), dict(tensors))


def apply(stage, block: Block) -> None:
    """The stage at every site in turn, as a sweep without calibration does it."""
    for site in SITES:
        stage.apply(block, site, None)


def nearest_on_grid(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Symmetric round to nearest, one value at a time."""
    result = torch.empty_like(weight)
    top = 2 ** (bits - 1) - 1
    for row in range(weight.shape[0]):
        for begin in range(0, weight.shape[1], group):
            values = [float(value) for value in weight[row, begin : begin + group]]
            scale = float(torch.tensor(max(map(abs, values)) / top).half())
            for offset, value in enumerate(values):
                result[row, begin + offset] = round(value / scale) * scale
    return result


@pytest.mark.parametrize("bits", [8, 4])
def test_every_linear_is_rounded_to_its_grid(block, bits):
    before = {leaf: block.weight(leaf) for leaf in block.linears()}
    bias = block.tensors["self_attn.q_proj.bias"].clone()
    apply(Quantize(bits=bits, group_size=16), block)
    module = block.module()
    for leaf, weight in before.items():
        linear = module.get_submodule(module_path(leaf))
        torch.testing.assert_close(linear.dense_weight(), nearest_on_grid(weight, bits, 16), rtol=1e-6, atol=1e-7)
    assert torch.equal(module.self_attn.q_proj.bias, bias)
    block.check()


def test_include_and_exclude_choose_by_name_and_glob(block):
    apply(Quantize(bits=8, include=["*_proj"], exclude=["down_proj", "?_proj"]), block)
    assert set(block.layer.linear_forms) == {"gate_proj", "up_proj"}
    assert block.tensors["mlp.gate_proj.values"].dtype == torch.int8
    assert block.tensors["mlp.down_proj.weight"].dtype == torch.float32
    block.check()


def test_a_name_that_matches_nothing_is_refused(block):
    with pytest.raises(ValueError, match="'fc1' matches no linear; .*'q_proj'"):
        Quantize(bits=8, include=["fc1"]).check_choice(block.layer)


def test_nothing_chosen_points_to_embeddings_alone(block):
    with pytest.raises(ValueError, match="leave none of .*; leave the stage out, or set embeddings: true for the emb"):
        Quantize(bits=8, exclude=["*"]).check_choice(block.layer)
    Quantize(bits=8, exclude=["*"], embeddings=True).check_choice(block.layer)


@pytest.mark.parametrize(
    ("settings", "lost"),
    [
        ({}, {"gate_proj": 31}),
        ({"symmetric": False}, {"gate_proj": 31}),
        # A zero point between two codes holds them.
        ({"symmetric": False, "zero_point_dtype": "float16", "method": "hqq"}, {}),
        ({"scale_dtype": "bfloat16"}, {}),
    ],
)
def test_values_too_small_for_the_scales_are_counted(block, settings, lost):
    weight = block.tensors["mlp.gate_proj.weight"]
    weight[3] = 2e-8  # below half of the smallest float16; two groups
    weight[3, 7] = 0.0  # all along
    weight[5, :16] = 2e-7  # a scale of the smallest number holds it
    apply(Quantize(bits=4, group_size=16, **settings), block)
    notes = [note for note in block.notes if "underflowed" in note]
    assert {note["matrix"]: note["underflowed"] for note in notes} == lost
    assert all((note["stage"], note["scale_dtype"]) == ("quantize", "float16") for note in notes)
    assert (block.weight("gate_proj")[5, :16] != 0).all()


def test_an_embedding_too_small_for_the_scales_is_told(caplog):
    weight = torch.randn(8, 32)
    weight[2, :16] = 1e-9
    Quantize(bits=4, group_size=16, embeddings=True).apply_top("lm_head", weight)
    assert [record.getMessage() for record in caplog.records] == [
        "quantize: lm_head: 16 values became zero, float16 has no scale so small"
    ]


def test_what_is_packed_already_is_refused(block):
    Quantize(bits=8).plan(block.layer)
    with pytest.raises(ValueError, match="q_proj is stored as int8, .* quantized already"):
        Quantize(bits=4).plan(block.layer)


def test_a_low_rank_linear_gets_integer_factors(block):
    weight = block.weight("up_proj")
    block.factorize("up_proj", weight[:8], torch.randn(64, 8, generator=torch.Generator().manual_seed(1)))
    a, b = block.weight("up_proj.a"), block.weight("up_proj.b")
    apply(Quantize(bits=8, group_size=16, include=["up_proj"]), block)
    torch.testing.assert_close(block.weight("up_proj.a"), nearest_on_grid(a, 8, 16), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(block.weight("up_proj.b"), nearest_on_grid(b, 8, 16), rtol=1e-6, atol=1e-7)
    block.check()


def test_a_sparse_matrix_keeps_its_mask(block):
    weight = block.weight("up_proj")
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    block.store("up_proj", weight * mask, LinearForm(sparsity="bitmask", nnz=int(mask.sum())), mask=mask)
    apply(Quantize(bits=4, group_size=16, include=["up_proj"]), block)
    assert torch.equal(block.mask("up_proj"), mask)
    expected = nearest_on_grid(weight * mask, 4, 16)
    torch.testing.assert_close(block.weight("up_proj"), expected, rtol=1e-6, atol=1e-7)
    block.check()


def inputs(width: int) -> InputStatistic:
    """The statistic of 300 correlated inputs."""
    generator = torch.Generator().manual_seed(2)
    statistic = InputStatistic("gram")
    statistic.add(torch.randn(300, width, generator=generator) @ torch.randn(width, width, generator=generator))
    return statistic


def test_scales_and_zero_points_have_the_dtypes_asked_for(block):
    apply(Quantize(bits=4, group_size=16, scale_dtype="bfloat16", include=["q_proj"]), block)
    zeros = {"symmetric": False, "zero_point_dtype": "float16"}
    apply(Quantize(bits=4, group_size=16, include=["k_proj"], **zeros), block)
    apply(Quantize(bits=8, group_size=16, include=["v_proj"], symmetric=False), block)
    stored = {name.removeprefix("self_attn."): tensor.dtype for name, tensor in block.tensors.items()}
    assert stored["q_proj.scales"] == torch.bfloat16 and "q_proj.zero_points" not in stored
    assert (stored["k_proj.scales"], stored["k_proj.zero_points"]) == (torch.float16, torch.float16)
    assert (stored["v_proj.scales"], stored["v_proj.zero_points"]) == (torch.float16, torch.uint8)
    block.check()


@pytest.mark.parametrize("group, rest", [(16, None), (24, 8), (128, 32), (None, None)])
def test_a_group_size_that_does_not_divide_is_reported(block, group, rest):
    stage = Quantize(bits=4, group_size=group, include=["q_proj"])
    assert stage.plan(copy.deepcopy(block.layer)) == {
        "matrices": ["q_proj"],
        **({} if rest is None else {"last_group_size": rest}),
    }
    apply(stage, block)
    block.check()


@pytest.mark.parametrize(
    "method, solve, settings",
    [("gptq", gptq, {"act_order": True, "scale_search": True}), ("coordinate_descent", coordinate_descent, {})],
)
def test_methods_with_data_keep_masks_and_tell_what_they_lost(block, method, solve, settings):
    weight = block.weight("up_proj")
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    block.store("up_proj", weight * mask, LinearForm(sparsity="bitmask", nnz=int(mask.sum())), mask=mask)
    stage = Quantize(bits=4, group_size=16, method=method, include=["up_proj"])
    statistic = inputs(weight.shape[1])
    assert stage.needs(block.layer) == {"mlp_input": "gram"}
    stage.apply(block, "mlp_input", statistic)
    expected = solve(weight * mask, statistic.gram, LinearForm(bits=4, group_size=16), mask, **settings)
    torch.testing.assert_close(block.weight("up_proj"), expected.weight, rtol=1e-5, atol=1e-7)
    assert torch.equal(block.mask("up_proj"), mask)
    (note,) = block.notes
    assert (note["stage"], note["matrix"]) == ("quantize", "up_proj") and 0 < note["loss"] < 0.05
    block.check()


def test_the_second_factor_is_rounded_for_what_the_first_one_puts_out(block):
    weight = block.weight("up_proj")
    block.factorize("up_proj", weight[:8], torch.randn(64, 8, generator=torch.Generator().manual_seed(1)))
    b, statistic = block.weight("up_proj.b"), inputs(weight.shape[1])
    plain = {"act_order": False, "scale_search": False}
    stage = Quantize(bits=4, group_size=4, method="gptq", include=["up_proj"], **plain)
    stage.apply(block, "mlp_input", statistic)
    expected = gptq(b, statistic.through(block.weight("up_proj.a")).gram, LinearForm(bits=4, group_size=4))
    torch.testing.assert_close(block.weight("up_proj.b"), expected.weight, rtol=1e-5, atol=1e-7)


def test_dampening_that_was_raised_is_told(block):
    statistic = inputs(32)
    statistic._gram[0] = 0
    statistic._gram[0, 0] = -0.5 * float(statistic.gram.diagonal().mean())
    Quantize(bits=4, group_size=16, method="gptq", include=["q_proj"]).apply(block, "attention_input", statistic)
    assert block.notes[0]["dampening"] == pytest.approx(1.0)


def test_a_fault_of_a_method_names_the_matrix(block):
    statistic = inputs(32)
    statistic._gram[0, 0] = float("inf")
    stage = Quantize(bits=4, group_size=16, method="gptq", include=["q_proj"])
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj: gram: .*not finite"):
        stage.apply(block, "attention_input", statistic)


@pytest.mark.parametrize(
    "settings, fault",
    [
        ({"method": "hqq"}, "method='hqq': .*set symmetric to false and zero_point_dtype to 'float16'"),
        ({"method": "hqq", "symmetric": False}, "method='hqq': .*zero_point_dtype='uint8'"),
        ({"zero_point_dtype": "float16"}, "zero_point_dtype='float16': .*set symmetric to false"),
        ({"act_order": True}, r"act_order=True: method='rtn' has no such; \['gptq'\] do"),
        ({"method": "coordinate_descent", "scale_search": True}, "scale_search=True: .*'rtn', 'gptq'"),
        ({"method": "gptq", "dampening": -1}, "dampening=-1: must be a number of at least 0"),
        ({"scale_dtype": "int8"}, "scale_dtype='int8' is not one of"),
        ({"static_groups": 1, "method": "gptq"}, "static_groups=1: must be true or false"),
        ({"static_groups": None, "method": "gptq"}, "static_groups=None: must be true or false"),
        ({"act_order": "yes", "method": "gptq"}, "act_order='yes': must be true or false"),
    ],
)
def test_settings_that_contradict_are_refused(settings, fault):
    with pytest.raises(ValueError, match=fault):
        Quantize(**{"bits": 4, **settings})


def test_an_embedding_is_rounded_to_nearest_whatever_the_method():
    weight = torch.randn(20, 32, generator=torch.Generator().manual_seed(3))
    plain = Quantize(bits=4, group_size=16, embeddings=True)
    searched = Quantize(bits=4, group_size=16, embeddings=True, method="gptq")
    stored = [stage.apply_top("embed_tokens", weight) for stage in (plain, searched)]
    errors = []
    for tensors in stored:
        assert tensors is not None
        errors.append((unpack_weight(tensors, plain.form, 32, torch.float32) - weight).square().sum())
    assert errors[1] < 0.98 * errors[0]


@pytest.mark.parametrize(
    "settings",
    [{"bits": 3}, {"method": "no"}, {"group_size": 0}, {"symmetric": "no"}, {"include": "q_proj"}, {"embeddings": 1}],
)
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Quantize(**{"bits": 8, **settings})
