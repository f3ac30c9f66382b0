"""Every form of a linear by every instruction set, against its twin in torch."""

import ctypes

import pytest
import torch

from hf_llmkernel import LinearForm
from hf_llmkernel.kernels import library, ops, twins
from hf_llmkernel.kernels.layout import dense_layout, packed_layout, stored_weight
from hf_llmkernel.model.linear_llm_kernel import largest_mask, pack_weight, unpack_weight

FORMS = {
    "int4": {"bits": 4, "group_size": 32},
    "int4 rows": {"bits": 4},
    "int4 odd groups": {"bits": 4, "group_size": 24, "symmetric": False},
    "int4 zero points": {"bits": 4, "group_size": 64, "symmetric": False, "zero_point_dtype": "float16"},
    "int8": {"bits": 8, "group_size": 64, "scale_dtype": "bfloat16"},
    "int8 rows": {"bits": 8, "scale_dtype": "float32"},
    "int8 zero points": {"bits": 8, "group_size": 40, "symmetric": False},
    "int8 half": {"bits": 8, "group_size": 32, "sparsity": "bitmask"},
    "int8 half zero points": {"bits": 8, "group_size": 32, "sparsity": "bitmask", "symmetric": False},
    "int8 2:4": {"bits": 8, "sparsity": "2:4"},
    "int4 half": {"bits": 4, "group_size": 32, "sparsity": "bitmask"},
    "int4 2:4": {"bits": 4, "group_size": 16, "sparsity": "2:4", "symmetric": False},
    "int4 1:4": {"bits": 4, "group_size": 128, "sparsity": "1:4"},
}
# Rows and columns; blocks are of 16 rows, segments of 32 columns.
SHAPES = {"one": (1, 1), "odd": (37, 201), "even": (64, 256), "row": (1, 333), "tall": (333, 7)}


def packed(rows: int, columns: int, **fields):
    """A random weight's form, stored tensors and dense values."""
    nnz = rows * columns // 2 if fields.get("sparsity") == "bitmask" else None
    form = LinearForm(**fields, nnz=nnz)
    weight = torch.randn(rows, columns)
    if form.sparsity is not None:
        weight = weight * largest_mask(weight, form)
    stored = pack_weight(weight, form)
    return form, stored, unpack_weight(stored, form, columns, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMS)
def test_integers_are_the_twins(level, name, shape):
    torch.manual_seed(0)
    rows, columns = SHAPES[shape]
    form, stored, dense = packed(rows, columns, **FORMS[name])
    layout = packed_layout(stored, form, rows, columns)
    bias = torch.randn(rows)
    for m in (1, 2, 3, 8, 13, 16, 70, 131):
        x = torch.randn(m, columns)
        y = torch.ops.llmkernel.linear(x, layout.data, layout.description, bias)
        twin = twins.linear(x, dense, form.bits, form.group_size, bias)
        # The integer products are exact; sums of fp32 in another order.
        torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-5 * float(twin.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMS)
def test_floating_activations_multiply_the_dense_weight(level, name, shape):
    torch.manual_seed(0)
    rows, columns = SHAPES[shape]
    form, stored, dense = packed(rows, columns, **FORMS[name])
    layout, bias = packed_layout(stored, form, rows, columns), torch.randn(rows)
    for m in (1, 3, 16, 131):
        x = torch.randn(m, columns)
        with library.floating_activations():
            y = torch.ops.llmkernel.linear(x, layout.data, layout.description, bias)
        exact = (x.double() @ dense.double().T + bias).float()
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_low_rank_pairs_take_floating_activations(level):
    torch.manual_seed(0)
    factors = [packed(24, 70, bits=4, group_size=32), packed(50, 24, bits=8)]
    layouts = [packed_layout(stored, form, *dense.shape) for form, stored, dense in factors]
    x = torch.randn(5, 70)
    described = [value for layout in layouts for value in (layout.data, layout.description)]
    with library.floating_activations():
        y = torch.ops.llmkernel.low_rank_linear(x, *described, None)
    exact = (x.double() @ factors[0][2].double().T @ factors[1][2].double().T).float()
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


SETTINGS = {
    "LLMKERNEL_ACTIVATIONS": ("int4", "must be int8 or float32", library.rounds_inputs),
    "LLMKERNEL_KERNELS": ("banana", "must be on or off", library.is_enabled),
    "LLMKERNEL_PATHS": ("banana", "must be measured or native", library.is_enabled),
    "LLMKERNEL_ISA": ("sse", "must be avx512 or avx2 or portable", library.is_enabled),
    "LLMKERNEL_THREADS": ("abc", "must be a whole number from 1 to 1024", library.threads),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_unknown_setting_is_refused(name, monkeypatch):
    value, rule, ask = SETTINGS[name]
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}='{value}': {rule}"):
        ask()
    monkeypatch.setenv(name, "")
    ask()  # as if it were not set


@pytest.mark.parametrize("threads", ["0", "-1", "99999999999", "1.5"])
def test_impossible_numbers_of_threads_are_refused(threads, monkeypatch):
    monkeypatch.setenv("LLMKERNEL_THREADS", threads)
    with pytest.raises(ValueError, match="LLMKERNEL_THREADS"):
        library.threads()


def test_sparse_layouts_are_smaller_where_the_processor_expands():
    torch.manual_seed(0)
    sizes = {}
    for name in ("int8", "int8 half", "int4", "int4 half"):
        form, stored, _ = packed(256, 512, **FORMS[name])
        sizes[name] = packed_layout(stored, form, 256, 512).data.nbytes
    if library.isa() == "avx512":
        assert sizes["int8 half"] < 0.7 * sizes["int8"]
        assert sizes["int4 half"] < 0.85 * sizes["int4"]
    else:
        assert sizes["int8 half"] <= sizes["int8"] + 8192


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floating_weights_are_the_twins(level, dtype, shape):
    torch.manual_seed(0)
    weight = torch.randn(SHAPES[shape]).to(dtype)
    layout = dense_layout(weight)
    assert layout.data.data_ptr() == weight.data_ptr()  # read where it is
    for m in (1, 5, 8, 17, 130):
        x = torch.randn(m, weight.shape[1])
        y = torch.ops.llmkernel.linear(x, layout.data, layout.description, None)
        twin = twins.linear(x, weight, 16, None)
        torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-5 * float(twin.abs().max()))


@pytest.mark.parametrize("sparsity", ["bitmask", "2:4"])
def test_sparse_bfloat16_is_the_twin(sparsity):
    if library.isa() != "avx512":
        pytest.skip("sparse floating values have a kernel on AVX512 alone")
    torch.manual_seed(0)
    for rows, columns in SHAPES.values():
        form = LinearForm(sparsity=sparsity, nnz=rows * columns // 3 if sparsity == "bitmask" else None)
        weight = torch.randn(rows, columns).to(torch.bfloat16)
        weight = weight * largest_mask(weight, form)
        layout = packed_layout(pack_weight(weight, form), form, rows, columns)
        for m in (1, 3, 9, 17, 130):
            x = torch.randn(m, columns)
            y = torch.ops.llmkernel.linear(x, layout.data, layout.description, None)
            twin = twins.linear(x, weight, 16, None)
            torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-5 * float(twin.abs().max() + 1))


def test_low_rank_pair_in_one_call(level):
    torch.manual_seed(0)
    a_form, a_stored, a = packed(24, 200, bits=4, group_size=32)
    b = torch.randn(70, 24).to(torch.bfloat16)
    first, second, bias = packed_layout(a_stored, a_form, 24, 200), dense_layout(b), torch.randn(70)
    x = torch.randn(2, 3, 200).to(torch.bfloat16)
    y = torch.ops.llmkernel.low_rank_linear(x, first.data, first.description, second.data, second.description, bias)
    assert y.shape == (2, 3, 70) and y.dtype == torch.bfloat16
    middle = twins.linear(x.flatten(0, 1), a, 4, 32)
    twin = twins.linear(middle, b, 16, None, bias).view(2, 3, 70).to(torch.bfloat16)
    torch.testing.assert_close(y, twin, rtol=2**-7, atol=2**-7)


def test_large_and_threaded(monkeypatch):
    """More threads than cores, a chunk for each many times over."""
    torch.manual_seed(0)
    form, stored, dense = packed(1000, 600, bits=4, group_size=32)
    layout = packed_layout(stored, form, 1000, 600)
    x = torch.randn(37, 600)
    twin = twins.linear(x, dense, 4, 32)
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("LLMKERNEL_THREADS", threads)
        for _ in range(20):
            y = torch.ops.llmkernel.linear(x, layout.data, layout.description, None)
            torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-3)


def test_rounded_activations_stay_near_the_exact_product():
    """What int8 activations cost: under 1 % of the output's spread, where activations are normal."""
    torch.manual_seed(0)
    form, stored, dense = packed(256, 512, bits=4, group_size=32)
    layout = packed_layout(stored, form, 256, 512)
    x = torch.randn(8, 512)
    exact = x @ dense.T
    error = torch.ops.llmkernel.linear(x, layout.data, layout.description, None) - exact
    assert error.std() < 0.01 * exact.std()


def test_extremes_of_the_codes(level):
    """Codes and activations at their ends, where a product of two bytes could saturate."""
    for bits, fields in ((8, {}), (8, {"symmetric": False}), (4, {}), (4, {"symmetric": False})):
        weight = torch.tensor([1.0, -1.0]).repeat(16, 64)  # [16, 128], all at an end of the range
        form = LinearForm(bits=bits, group_size=32, **fields)
        stored = pack_weight(weight, form)
        dense = unpack_weight(stored, form, 128, torch.float32)
        layout = packed_layout(stored, form, 16, 128)
        for x in (weight[:1], torch.ones(1, 128), -weight[:1]):
            y = torch.ops.llmkernel.linear(x.contiguous(), layout.data, layout.description, None)
            torch.testing.assert_close(y, twins.linear(x, dense, bits, 32), rtol=1e-5, atol=1e-4)


def test_zeros_and_tiny_activations(level):
    form, stored, dense = packed(16, 64, bits=8, group_size=32)
    layout = packed_layout(stored, form, 16, 64)
    x = torch.zeros(2, 64)
    x[1, 3] = 1e-30
    y = torch.ops.llmkernel.linear(x, layout.data, layout.description, None)
    assert torch.equal(y[0], torch.zeros(16))
    torch.testing.assert_close(y, twins.linear(x, dense, 8, 32), rtol=1e-5, atol=0)


def test_operators_pass_torchs_checks():
    torch.manual_seed(0)
    form, stored, _ = packed(32, 64, bits=4, group_size=32)
    layout, dense = packed_layout(stored, form, 32, 64), dense_layout(torch.randn(16, 32))
    tests = ("test_schema", "test_faketensor")
    x = torch.randn(2, 64)
    torch.library.opcheck(torch.ops.llmkernel.linear, (x, layout.data, layout.description, None), test_utils=tests)
    arguments = (x, layout.data, layout.description, dense.data, dense.description, torch.randn(16))
    torch.library.opcheck(torch.ops.llmkernel.low_rank_linear, arguments, test_utils=tests)


def test_wrong_inputs_are_refused():
    layout = dense_layout(torch.randn(4, 8))
    with pytest.raises(ValueError, match="must be float32 or bfloat16"):
        ops.linear(torch.randn(2, 8).half(), layout.data, layout.description, None)
    with pytest.raises(ValueError, match="8"):
        ops.linear(torch.randn(2, 9), layout.data, layout.description, None)
    assert dense_layout(torch.randn(4, 8).half()) is None
    assert dense_layout(torch.randn(4, 8).T) is None


@pytest.mark.parametrize("damage", ["value lost", "mask bit more", "group uneven"])
def test_damaged_weights_are_refused_never_read_out_of_bounds(damage):
    torch.manual_seed(0)
    sparsity = "2:4" if damage == "group uneven" else "bitmask"
    form, stored, _ = packed(8, 64, bits=8, sparsity=sparsity)
    if damage == "value lost":
        stored["values"] = stored["values"][:-1].clone()
    else:
        stored["mask"] = stored["mask"].clone()
        stored["mask"][3, 2] ^= 1
    weight, matrix, size = stored_weight(stored, form, 8, 64), library.Matrix(), ctypes.c_int64()
    fault = library.NATIVE.llmk_plan(ctypes.byref(weight), ctypes.byref(matrix), ctypes.byref(size))
    assert b"contradict" in fault
