"""The forms of a linear against naive references written element by element."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from hf_llmkernel.model.configuration_llm_kernel import LinearForm
from hf_llmkernel.model.linear_llm_kernel import (
    LowRankLinear,
    PackedLinear,
    build_embedding,
    build_linear,
    check_mask,
    largest_mask,
    pack_mask,
    pack_nibbles,
    pack_weight,
    population,
    unpack_mask,
    unpack_nibbles,
    unpack_rows,
    unpack_weight,
)

OUT, IN = 12, 21  # neither a multiple of 8, of a group, nor of M

SPARSITIES = {
    "full": {},
    "bitmask": {"sparsity": "bitmask", "nnz": 101},
    "empty": {"sparsity": "bitmask", "nnz": 0},
    "2:4": {"sparsity": "2:4"},
    "3:5": {"sparsity": "3:5"},
}
INTEGERS = {
    "float": {},
    "int8": {"bits": 8, "group_size": 8},
    "int8 row": {"bits": 8},
    "int8 asymmetric": {"bits": 8, "group_size": 8, "symmetric": False, "scale_dtype": "float32"},
    "int4": {"bits": 4, "group_size": 8},
    "int4 float zero": {
        "bits": 4,
        "group_size": 8,
        "symmetric": False,
        "zero_point_dtype": "float16",
        "scale_dtype": "bfloat16",
    },
}
PACKED = {
    f"{sparsity}, {integer}": LinearForm.from_dict({**SPARSITIES[sparsity], **INTEGERS[integer]})
    for sparsity, integer in itertools.product(SPARSITIES, INTEGERS)
    if (sparsity, integer) != ("full", "float")
}
ALL = {
    "dense": LinearForm(bias=True),
    **PACKED,
    "low-rank": LinearForm(rank=5, bias=True),
    "low-rank of forms": LinearForm.from_dict(
        {"rank": 5, "a": {"bits": 8, "group_size": 8}, "b": {"sparsity": "2:4", "bits": 4}}
    ),
}


def weight_of(form: LinearForm, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
    return weight * largest_mask(weight, form) if form.sparsity else weight


def naive_mask(weight: np.ndarray, form: LinearForm) -> np.ndarray:
    """Element by element: the largest of all, or of every group of M."""
    mask = np.zeros(weight.shape, dtype=bool)
    if form.sparsity == "bitmask":
        order = sorted(np.ndindex(*weight.shape), key=lambda at: -abs(weight[at]))
        for at in order[: form.nnz]:
            mask[at] = True
        return mask
    kept, group = form.kept_of_group()
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            columns = list(range(start, min(start + group, weight.shape[1])))
            for column in sorted(columns, key=lambda c: -abs(weight[row, c]))[:kept]:
                mask[row, column] = True
    return mask


def naive_round(weight: np.ndarray, form: LinearForm, stored: dict) -> np.ndarray:
    """Element by element: the nearest point of the group's grid, from the scales as stored."""
    result = np.zeros_like(weight, dtype=np.float64)
    group = form.group_size or weight.shape[1]
    for row, column in np.ndindex(*weight.shape):
        scale = float(stored["scales"][row, column // group])
        zero = float(stored["zero_points"][row, column // group]) if "zero_points" in stored else 0.0
        low, high = {8: (-127, 127), 4: (-8, 7)}[form.bits] if form.symmetric else (0, 2**form.bits - 1)
        code = min(max(np.rint(weight[row, column] / scale + zero), low), high) if scale else zero
        result[row, column] = (code - zero) * scale
    return result


def test_masks_are_bits_lowest_first():
    mask = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(1)) > 0.5
    reference = np.packbits(mask.numpy(), axis=1, bitorder="little")
    assert np.array_equal(pack_mask(mask).numpy(), reference)
    assert torch.equal(unpack_mask(pack_mask(mask), IN), mask)
    assert population(torch.arange(256).to(torch.uint8)).tolist() == [bin(byte).count("1") for byte in range(256)]


def test_nibbles_are_two_a_byte_lowest_first():
    codes = torch.arange(15, dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.tolist() == [
        low | (high << 4) for low, high in zip(range(0, 15, 2), [*range(1, 15, 2), 0], strict=True)
    ]
    assert torch.equal(unpack_nibbles(packed, 15), codes)


@pytest.mark.parametrize("name", [name for name in PACKED if not name.startswith("full")])
def test_largest_mask_is_the_naive_one(name):
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3))
    assert np.array_equal(largest_mask(weight, PACKED[name]).numpy(), naive_mask(weight.numpy(), PACKED[name]))


@pytest.mark.parametrize("name", PACKED)
def test_packed_weight_is_stored_as_the_form_says_and_comes_back(name):
    form, weight = PACKED[name], weight_of(PACKED[name])
    stored = pack_weight(weight, form)
    expected = form.stored_tensors(OUT, IN)
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == {key: s for key, (s, _) in expected.items()}
    for key, (_, dtype) in expected.items():
        assert stored[key].dtype == (torch.float32 if dtype is None else getattr(torch, dtype))

    dense = unpack_rows(stored, form, IN, torch.float32)
    reference = weight.numpy() if form.bits == 16 else naive_round(weight.numpy(), form, stored)
    if form.sparsity:
        reference = reference * naive_mask(weight.numpy(), form)
        assert not dense[weight == 0].any()
    np.testing.assert_allclose(dense.numpy(), reference, atol=1e-6)


@pytest.mark.parametrize("name", PACKED)
def test_rounding_error_is_at_most_half_a_step(name):
    form, weight = PACKED[name], weight_of(PACKED[name])
    if form.bits == 16:
        assert torch.equal(unpack_rows(pack_weight(weight, form), form, IN, torch.float32), weight)
        return
    stored = pack_weight(weight, form)
    step = stored["scales"].float().repeat_interleave(form.group_size or IN, 1)[:, :IN]
    error = (unpack_rows(stored, form, IN, torch.float32) - weight).abs()
    # a scale rounded to its dtype moves the ends of the range by that much, a rounded zero point by half a step
    slack = 1 + 0.02 * 2**form.bits * (form.scale_dtype == "bfloat16") + 0.003 * 2**form.bits + (not form.symmetric)
    assert (error <= step / 2 * slack + 1e-7).all()


@pytest.mark.parametrize("name", PACKED)
def test_chosen_rows_are_those_of_the_whole(name):
    form = PACKED[name]
    stored = pack_weight(weight_of(form), form)
    rows = torch.tensor([11, 0, 5, 5, 3])
    whole = unpack_rows(stored, form, IN, torch.float32)
    assert torch.equal(unpack_rows(stored, form, IN, torch.float32, rows), whole[rows])


def test_groups_of_zeros_and_of_tiny_values_stay_finite():
    weight = torch.zeros(2, 16)
    weight[1, 0] = 1e-12
    for integer in ({"bits": 8}, {"bits": 4, "symmetric": False}, {"bits": 4, "group_size": 8}):
        form = LinearForm.from_dict(integer)
        dense = unpack_rows(pack_weight(weight, form), form, 16, torch.float32)
        assert dense.isfinite().all() and dense.abs().max() < 1e-6


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="nonzeros too many"):
        pack_weight(torch.ones(4, 8), LinearForm(sparsity="2:4"))
    with pytest.raises(ValueError, match="nonzeros too many"):
        pack_weight(torch.ones(4, 8), LinearForm(sparsity="bitmask", nnz=31))
    with pytest.raises(ValueError, match="scale_dtype='float16'"):
        pack_weight(torch.full((4, 8), 1e8), LinearForm(bits=4))


def test_damaged_masks_are_found():
    form = LinearForm(sparsity="bitmask", nnz=4)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, :4] = True
    check_mask(pack_mask(mask), form, 11)
    with pytest.raises(ValueError, match="population 4 is not the value count nnz=5"):
        check_mask(pack_mask(mask), LinearForm(sparsity="bitmask", nnz=5), 11)
    stray = pack_mask(mask)
    stray[1, 1] = 128  # column 15 of 11
    with pytest.raises(ValueError, match="beyond column 11"):
        check_mask(stray, form, 11)
    with pytest.raises(ValueError, match="do not keep 2:4"):
        check_mask(pack_mask(mask), LinearForm(sparsity="2:4"), 11)


def filled(form: LinearForm, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A linear of a form with random content."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        linear = build_linear(IN, OUT, form)
    finally:
        torch.set_default_dtype(torch.float32)
    for module in linear.modules():
        if isinstance(module, PackedLinear):
            weight = torch.randn(module.out_features, module.in_features, dtype=dtype)
            mask = largest_mask(weight, module.form) if module.form.sparsity else None
            packed = pack_weight(weight if mask is None else weight * mask, module.form, mask)
            for key, tensor in module.stored().items():
                tensor.data.copy_(packed[key])
    return linear.eval()


@pytest.mark.parametrize("name", ALL)
def test_a_linear_multiplies_by_its_dense_weight(name):
    form = ALL[name]
    linear = filled(form)
    x = torch.randn(3, 5, IN)
    weight = unpack_weight(linear.state_dict(), form, IN, torch.float32)
    expected = x.double() @ weight.double().T + (linear.bias.double() if linear.bias is not None else 0)
    for _ in range(2):  # the second call may use what the first derived
        with torch.no_grad():
            torch.testing.assert_close(linear(x).double(), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (IN, OUT)


@pytest.mark.parametrize("name", ALL)
def test_state_dict_holds_what_the_form_says_and_nothing_derived(name):
    linear = filled(ALL[name])
    with torch.no_grad():
        linear(torch.randn(2, IN))
    state = {key: tuple(tensor.shape) for key, tensor in linear.state_dict().items()}
    assert state == {key: shape for key, (shape, _) in ALL[name].stored_tensors(OUT, IN).items()}


@pytest.mark.parametrize("name", PACKED)
def test_casting_changes_floating_values_and_never_scales(name):
    linear = filled(PACKED[name])
    before = {key: tensor.clone() for key, tensor in linear.state_dict().items()}
    linear = linear.to(torch.float16).to(torch.float32)
    for key, tensor in linear.state_dict().items():
        if key != "values" or PACKED[name].bits < 16:
            assert torch.equal(tensor, before[key]) and tensor.dtype == before[key].dtype
    assert linear.to(torch.bfloat16)(torch.randn(2, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_derived_weight_follows_what_it_came_from():
    linear = filled(PACKED["full, int8"])
    x = torch.randn(2, IN)
    with torch.inference_mode():
        first = linear(x)
    with torch.no_grad():
        linear.scales.mul_(2)
        torch.testing.assert_close(linear(x), first * 2)
        linear.values = nn.Parameter(torch.zeros_like(linear.values), requires_grad=False)
        assert not linear(x).any()
    x.requires_grad_()
    linear(x).sum().backward()  # what inference mode derived does not stand in the way of a gradient


def test_copies_and_pickles_leave_derived_data_behind():
    linear = filled(PACKED["2:4, int8"])
    with torch.no_grad():
        linear(torch.randn(2, IN))
    assert linear._derived is not None
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert twin._derived is None
        assert all(
            torch.equal(a, b) for a, b in zip(twin.state_dict().values(), linear.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize("name", ["bitmask, float", "2:4, float", "low-rank"])
def test_floating_forms_train_and_keep_their_zeros(name):
    linear = filled(ALL[name]).train()
    zeros = unpack_weight(linear.state_dict(), ALL[name], IN, torch.float32) == 0
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1)
    x, target = torch.randn(64, IN), torch.randn(64, OUT)
    losses = []
    for _ in range(20):
        loss = (linear(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    if ALL[name].sparsity:
        assert not unpack_weight(linear.state_dict(), ALL[name], IN, torch.float32)[zeros].any()


def test_gradient_of_sparse_values_is_the_dense_one_at_their_places():
    linear = filled(PACKED["bitmask, float"])
    x = torch.randn(7, IN)
    linear(x).square().sum().backward()
    weight = unpack_weight(linear.state_dict(), linear.form, IN, torch.float32).requires_grad_()
    (x @ weight.T).square().sum().backward()
    mask = unpack_mask(linear.mask, IN)
    torch.testing.assert_close(linear.values.grad, weight.grad[mask])


@pytest.mark.parametrize("name", [name for name in PACKED if "int" in name])
def test_integers_take_no_gradient_but_pass_it_on(name):
    linear = filled(PACKED[name]).train()
    assert not any(p.requires_grad for key, p in linear.named_parameters() if key != "bias")
    x = torch.randn(3, IN, requires_grad=True)
    linear(x).sum().backward()
    weight = unpack_weight(linear.state_dict(), PACKED[name], IN, torch.float32)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, IN))


@pytest.mark.parametrize("name", ALL)
def test_an_embedding_looks_up_the_rows_of_the_linear_that_stores_the_same(name):
    form = LinearForm.from_dict({**ALL[name].to_dict(), "bias": None})
    linear = filled(form)
    embedding = build_embedding(OUT, IN, form).eval()
    embedding.load_state_dict(linear.state_dict())
    ids = torch.tensor([[0, 11], [5, 5]])
    weight = unpack_weight(linear.state_dict(), form, IN, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(embedding(ids), weight[ids], atol=1e-6, rtol=1e-5)


def test_dense_is_an_exact_linear_and_low_rank_is_two_of_them():
    assert type(build_linear(IN, OUT, LinearForm())) is nn.Linear
    low_rank = build_linear(IN, OUT, LinearForm(rank=3, bias=True))
    assert isinstance(low_rank, LowRankLinear)
    assert type(low_rank.a) is nn.Linear and type(low_rank.b) is nn.Linear
    assert low_rank.a.bias is None and low_rank.b.bias is not None
    assert type(build_embedding(OUT, IN, LinearForm(), 0)) is nn.Embedding
