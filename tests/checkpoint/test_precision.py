"""What integers and low ranks stand for, against the range of a dtype: values by hand."""

import pytest
import torch

from hf_llmkernel.checkpoint.precision import check_products
from hf_llmkernel.model.configuration_llm_kernel import LinearForm
from hf_llmkernel.model.linear_llm_kernel import pack_weight

SYMMETRIC = LinearForm(bits=8, scale_dtype="float32")
ZEROS = LinearForm(bits=4, symmetric=False, zero_point_dtype="float32", scale_dtype="float32")
SPARSE = LinearForm(bits=8, sparsity="2:4")


def check(form: LinearForm, stored: dict[str, torch.Tensor], shape: tuple[int, int] = (4, 8)) -> None:
    check_products("w", form, shape, torch.float16, stored.__getitem__)


@pytest.mark.parametrize("form", [SYMMETRIC, ZEROS, SPARSE], ids=["symmetric", "zero points", "sparse"])
def test_integers_end_where_float16_does(form):
    weight = torch.ones(4, 8)
    weight[:, 1::2] = 0
    weight[2, 4] = 65500
    check(form, pack_weight(weight, form, mask=weight != 0 if form.sparsity else None))
    weight[2, 4] = 65600
    message = r"^dtype=float16: w stands for values up to 6.56e\+04, and the largest number is 65504; choose"
    with pytest.raises(ValueError, match=message):
        check(form, pack_weight(weight, form, mask=weight != 0 if form.sparsity else None))


def test_a_scale_of_codes_that_are_small_is_no_fault():
    stored = {"values": torch.full((4, 8), 2, dtype=torch.int8), "scales": torch.full((4, 1), 3e4)}
    check(SYMMETRIC, stored)
    stored["values"][1, 1] = -3
    with pytest.raises(ValueError, match=r"w stands for values up to 9e\+04"):
        check(SYMMETRIC, stored)


def test_a_low_rank_is_its_product_and_its_factors():
    form = LinearForm(rank=2, b=SYMMETRIC)
    a = {"a.weight": torch.full((2, 8), 100.0)}
    b = pack_weight(torch.full((4, 2), 100.0), SYMMETRIC)
    check(form, {**a, **{f"b.{name}": tensor for name, tensor in b.items()}})  # 2 · 100 · 100
    b = pack_weight(torch.full((4, 2), 400.0), SYMMETRIC)
    with pytest.raises(ValueError, match=r"dtype=float16: w stands for values up to 8e\+04"):
        check(form, {**a, **{f"b.{name}": tensor for name, tensor in b.items()}})
    b = pack_weight(torch.full((4, 2), 7e4), SYMMETRIC)
    with pytest.raises(ValueError, match=r"dtype=float16: w.b stands for values up to 7e\+04"):
        check(form, {**a, **{f"b.{name}": tensor for name, tensor in b.items()}})


def test_only_where_they_might_be_beyond_are_values_read():
    check(SYMMETRIC, {"scales": torch.full((4, 1), 200.0)})
    check(LinearForm(), {})
