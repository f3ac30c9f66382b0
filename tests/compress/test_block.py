"""What stages do to a block, in every form, against dense weights kept beside it.

Shapes: O out_features, I in_features, R rank.
"""

import copy

import pytest
import torch

from hf_llmkernel.compress.block import Block, module_path
from hf_llmkernel.model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelDecoderLayer

from .conftest import TINY

LEAF, ROWS, COLUMNS, RANK = "up_proj", 64, 32, 8
KEPT = 700  # of a bitmask of all of it
FORMS = {
    "dense": LinearForm(),
    "bitmask": LinearForm(sparsity="bitmask", nnz=KEPT),
    "2:4": LinearForm(sparsity="2:4"),
    "int8": LinearForm(bits=8, group_size=16),
    "int4 asymmetric": LinearForm(bits=4, group_size=24, symmetric=False),
    "bitmask int8": LinearForm(sparsity="bitmask", nnz=KEPT, bits=8, group_size=16),
    "2:4 int4": LinearForm(sparsity="2:4", bits=4),
    "low rank": LinearForm(rank=RANK),
    "packed low rank": LinearForm(rank=RANK, a=LinearForm(bits=8, group_size=16), b=LinearForm(sparsity="2:4")),
}
MATRICES = [name for name in FORMS if FORMS[name].rank is None]


def fresh_block(bias: bool = True) -> Block:
    config = LLMKernelConfig(**TINY, mlp_bias=bias, attention_bias=bias)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    tensors = {name: torch.randn_like(tensor) for name, tensor in LLMKernelDecoderLayer(config, 0).state_dict().items()}
    return Block(2, copy.deepcopy(config), tensors)


def grid_of(weight: torch.Tensor, form: LinearForm) -> torch.Tensor:
    """Steps between integer values, one a weight: `max|w| / (2^(b-1) - 1)`, or the range with zero over `2^b - 1`."""
    steps = torch.empty_like(weight)
    group = form.group_size or weight.shape[1]
    for row in range(len(weight)):
        for begin in range(0, weight.shape[1], group):
            values = weight[row, begin : begin + group]
            if form.symmetric:
                step = values.abs().max() / (2 ** (form.bits - 1) - 1)
            else:
                step = (values.max().clamp(min=0) - values.min().clamp(max=0)) / (2**form.bits - 1)
            steps[row, begin : begin + group] = step
    return steps


def kept_by(weight: torch.Tensor, form: LinearForm) -> torch.Tensor:
    """A mask that the form has room for: the largest of all, or of every four columns."""
    if form.sparsity is None:
        return torch.ones_like(weight, dtype=torch.bool)
    if form.sparsity == "bitmask":
        return weight.abs() >= weight.abs().flatten().sort(descending=True).values[KEPT - 1]
    groups = weight.abs().view(len(weight), -1, 4)
    return (groups >= groups.sort(-1, descending=True).values[..., 1:2]).view(weight.shape)


def assert_near(block: Block, name: str, expected: torch.Tensor, grid: torch.Tensor | None) -> None:
    """Equal, or on a grid within half a step, and a little for scales in fp16."""
    distance = (block.weight(name) - expected).abs()
    assert (distance <= (0 if grid is None else 0.501 * grid + 1e-3 * expected.abs())).all()


def stored_block(name: str, bias: bool = True) -> tuple[Block, dict[str, torch.Tensor]]:
    """A block whose up_proj has a form, and the dense weights of its matrices as the form holds them."""
    block, form = fresh_block(bias), FORMS[name]
    draw = torch.Generator().manual_seed(1)
    if form.rank is None:
        matrices = {LEAF: (torch.randn(ROWS, COLUMNS, generator=draw), form)}
    else:
        a, b = torch.randn(RANK, COLUMNS, generator=draw), torch.randn(ROWS, RANK, generator=draw)
        block.factorize(LEAF, a, b)
        matrices = {f"{LEAF}.a": (a, form.a or LinearForm()), f"{LEAF}.b": (b, form.b or LinearForm())}
    for matrix, (weight, own) in matrices.items():
        mask = kept_by(weight, own)
        block.store(matrix, weight * mask, own, mask=None if own.sparsity is None else mask)
    return block, {matrix: block.weight(matrix) for matrix in matrices}


def reference(dense: dict[str, torch.Tensor]) -> torch.Tensor:
    return dense[LEAF] if LEAF in dense else dense[f"{LEAF}.b"] @ dense[f"{LEAF}.a"]


def output(block: Block, inputs: torch.Tensor) -> torch.Tensor:
    """Of up_proj, as a loaded model computes it."""
    with torch.no_grad():
        return block.module().get_submodule(module_path(LEAF))(inputs)


INPUTS = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", MATRICES)
def test_what_is_stored_is_what_was_given(name):
    block, form = fresh_block(), FORMS[name]
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    mask = kept_by(weight, form)
    bias = block.bias(LEAF)
    others = {key: tensor for key, tensor in block.tensors.items() if LEAF not in key}
    block.store(LEAF, weight * mask, form, mask=None if form.sparsity is None else mask)
    block.check()
    assert block.form(LEAF) == form.with_bias(True)
    assert_near(block, LEAF, weight * mask, None if form.bits == 16 else grid_of(weight * mask, form))
    assert (block.mask(LEAF) is None) == (form.sparsity is None)
    if form.sparsity is not None:
        assert torch.equal(block.mask(LEAF), mask)
        assert not block.weight(LEAF)[~mask].any()
    expected = INPUTS @ block.weight(LEAF).T + bias
    torch.testing.assert_close(output(block, INPUTS), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(block.tensors[key], tensor) for key, tensor in others.items())


def test_back_to_dense_leaves_nothing_behind():
    block, _ = stored_block("bitmask int8")
    weight = torch.randn(ROWS, COLUMNS)
    block.store(LEAF, weight, LinearForm())
    block.check()
    assert torch.equal(block.weight(LEAF), weight) and LEAF not in block.layer.linear_forms
    assert [key for key in block.tensors if LEAF in key] == ["mlp.up_proj.bias", "mlp.up_proj.weight"]


@pytest.mark.parametrize("name", FORMS)
def test_new_values_keep_mask_and_grid(name):
    block, before = stored_block(name)
    forms = {matrix: block.form(matrix) for matrix in before}
    masks = {matrix: block.mask(matrix) for matrix in before}
    scales = {key: tensor for key, tensor in block.tensors.items() if key.endswith(("scales", "zero_points"))}
    for matrix, weight in before.items():
        block.set_weight(matrix, weight * 0.75)
    block.check()
    for matrix, weight in before.items():
        assert block.form(matrix) == forms[matrix]
        assert masks[matrix] is None or torch.equal(block.mask(matrix), masks[matrix])
        integer = forms[matrix].bits < 16
        assert_near(block, matrix, weight * 0.75, grid_of(weight, forms[matrix]) if integer else None)
    assert all(torch.equal(block.tensors[key], tensor) for key, tensor in scales.items())


def test_a_weight_that_the_form_cannot_hold_names_the_matrix():
    block = fresh_block()
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.up_proj: sparsity='2:4': the weight has \d+ nonzeros"):
        block.store(LEAF, torch.ones(ROWS, COLUMNS), LinearForm(sparsity="2:4"))
    block.check()
    assert block.form(LEAF).is_dense


@pytest.mark.parametrize("bias", [True, False])
def test_factors_compute_their_product(bias):
    block = fresh_block(bias)
    expected_bias = block.bias(LEAF) if bias else torch.zeros(ROWS)
    a, b = torch.randn(RANK, COLUMNS), torch.randn(ROWS, RANK)
    block.factorize(LEAF, a, b)
    block.check()
    assert block.matrices("mlp_input") == ["gate_proj", "up_proj.a", "up_proj.b"]
    assert block.form(LEAF) == LinearForm(rank=RANK, bias=bias)
    torch.testing.assert_close(block.weight(LEAF), b @ a)
    torch.testing.assert_close(output(block, INPUTS), INPUTS @ a.T @ b.T + expected_bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("had_bias", [True, False])
def test_a_bias_is_given_to_every_form(name, had_bias):
    block, dense = stored_block(name, had_bias)
    assert (block.bias(LEAF) is not None) == had_bias
    bias = torch.randn(ROWS)
    block.set_bias(LEAF, bias)
    block.check()
    assert torch.equal(block.bias(LEAF), bias)
    torch.testing.assert_close(output(block, INPUTS), INPUTS @ reference(dense).T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_outputs_that_stay_are_those_chosen(name):
    block, dense = stored_block(name)
    bias, keep = block.bias(LEAF), torch.tensor([0, 3, 4, 17, 40, 63])
    block.keep_outputs(LEAF, keep)
    for other in ("gate_proj", "down_proj"):  # the block is one again when all of them have this width
        weight = block.weight(other)
        block.store(other, weight[keep] if other == "gate_proj" else weight[:, keep], LinearForm())
    block.tensors["mlp.gate_proj.bias"] = block.bias("gate_proj")[keep]
    block.layer.intermediate_size = len(keep)
    block.check()
    expected = reference(dense)[keep]
    torch.testing.assert_close(block.weight(LEAF), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(block.bias(LEAF), bias[keep])
    torch.testing.assert_close(output(block, INPUTS), INPUTS @ expected.T + bias[keep], rtol=1e-4, atol=1e-4)
    if FORMS[name].nnz is not None:
        assert block.form(LEAF).nnz == int((dense[LEAF][keep] != 0).sum()) == int(block.mask(LEAF).sum())


@pytest.mark.parametrize("name", FORMS)
def test_outputs_are_scaled_in_every_form(name):
    block, dense = stored_block(name)
    bias, factors = block.bias(LEAF), torch.rand(ROWS) + 0.5
    block.scale_outputs(LEAF, factors)
    block.check()
    expected = reference(dense) * factors.unsqueeze(1)
    torch.testing.assert_close(block.weight(LEAF), expected, rtol=1e-3, atol=1e-5)  # scales are fp16
    torch.testing.assert_close(block.bias(LEAF), bias * factors)


@pytest.mark.parametrize(
    ("sublayer", "gone"), [("attention", ("self_attn.", "input_layernorm.")), ("mlp", ("mlp.", "post_attention_"))]
)
def test_a_skipped_sublayer_is_gone_with_its_norm_and_forms(sublayer, gone):
    block, _ = stored_block("int8")
    block.store("o_proj", block.weight("o_proj"), LinearForm(bits=8))
    staying = {key for key in block.tensors if not key.startswith(gone)}
    block.skip(sublayer)
    block.check()
    assert set(block.tensors) == staying
    assert not block.has(sublayer) and block.layer.skip == [sublayer]
    assert set(block.layer.linear_forms) == ({LEAF} if sublayer == "attention" else {"o_proj"})
    hidden = torch.randn(1, 3, 32)
    rotation = torch.ones(1, 3, 8), torch.zeros(1, 3, 8)
    with torch.no_grad():
        assert (block.module()(hidden, position_embeddings=rotation) != hidden).any()
    block.skip({"attention": "mlp", "mlp": "attention"}[sublayer])
    block.check()
    assert not block.tensors and not block.linears()


def test_what_is_stored_is_cast_but_for_integers_and_scales():
    block, dense = stored_block("packed low rank")
    block.cast(torch.bfloat16, ["up_proj"])
    dtypes = {key.removeprefix("mlp.up_proj."): tensor.dtype for key, tensor in block.tensors.items() if LEAF in key}
    assert dtypes == {
        "a.values": torch.int8,
        "a.scales": torch.float16,
        "b.values": torch.bfloat16,
        "b.mask": torch.uint8,
        "b.bias": torch.bfloat16,
    }
    assert block.tensors["mlp.gate_proj.weight"].dtype == torch.float32
    torch.testing.assert_close(block.weight(f"{LEAF}.b"), dense[f"{LEAF}.b"].bfloat16().float())
    block.cast(torch.float16)
    assert block.tensors["mlp.gate_proj.weight"].dtype == torch.float16
    with pytest.raises(ValueError, match="dtype=float16: model.layers.2.mlp.down_proj.weight has values beyond"):
        block.store("down_proj", torch.full((32, 64), 1e6), LinearForm())
        block.cast(torch.float16)


def test_tensors_that_are_not_those_of_the_configuration_are_named():
    block = fresh_block()
    for change, message in (
        (lambda tensors: tensors.pop("mlp.up_proj.weight"), r"layers.2.mlp.up_proj.weight: missing"),
        (lambda tensors: tensors.update({"mlp.fc.weight": torch.ones(1)}), "layers.2.mlp.fc.weight: not of the conf"),
        (
            lambda tensors: tensors.update({"mlp.up_proj.bias": torch.ones(3)}),
            r"has shape \[3\], config.json says \[64",
        ),
    ):
        tensors = dict(block.tensors)
        change(tensors)
        with pytest.raises(ValueError, match=message):
            Block(2, block.layer, tensors)


def test_messages_name_the_layer_of_the_source():
    block = fresh_block()
    assert block.path("q_proj") == "model.layers.2.self_attn.q_proj"
    moved = Block(2, block.layer, block.tensors, origin=5)
    assert (moved.index, moved.path("down_proj")) == (2, "model.layers.5.mlp.down_proj")
