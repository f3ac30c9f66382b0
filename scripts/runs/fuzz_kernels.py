"""Random forms, shapes, numbers of rows and threads through the native linears and prompts, against torch.

    python scripts/runs/fuzz_kernels.py [--seconds 60] [--seed 0]

Ends with an error at the first difference and names its case; `scripts/runs/sanitize.sh` runs it with sanitizers.
"""

import argparse
import ctypes
import os
import random
import time
from typing import Any

import torch
from transformers import DynamicCache

from hf_llmkernel import IntegerCache, LinearForm, LLMKernelConfig, LLMKernelForCausalLM
from hf_llmkernel.kernels import disabled, library, twins
from hf_llmkernel.kernels.layout import packed_layout, stored_weight
from hf_llmkernel.model.linear_llm_kernel import largest_mask, pack_weight, unpack_weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    end, cases = time.monotonic() + arguments.seconds, 0
    while time.monotonic() < end:
        seed = arguments.seed + cases
        random.seed(seed)
        torch.manual_seed(seed)
        level = set_level(random.choice(("avx512", "avx2", "portable")))
        os.environ["LLMKERNEL_THREADS"] = str(random.randint(1, 4))
        case = random.choice((fuzz_linear, fuzz_linear, fuzz_damage, fuzz_prompt))
        try:
            case()
        except Exception as error:
            raise SystemExit(f"seed {seed}, {case.__name__}, {level}: {error}") from error
        cases += 1
    print(f"{cases} cases, no difference")


def set_level(name: str) -> str | None:
    assert library.NATIVE is not None, "the native library is not built"
    library.NATIVE.llmk_set_isa(name.encode())
    return library.isa()


def random_form(rows: int, columns: int) -> LinearForm:
    fields: dict[str, Any] = {"bits": random.choice((4, 8)), "symmetric": random.random() < 0.5}
    fields["group_size"] = random.choice((None, 8, 16, 24, 32, 40, 64, 128))
    fields["scale_dtype"] = random.choice(("float16", "bfloat16", "float32"))
    fields["sparsity"] = random.choice((None, None, "2:4", "1:4", "bitmask"))
    if fields["sparsity"] == "bitmask":
        fields["nnz"] = random.randint(0, rows * columns)
    return LinearForm(**fields)


def random_weight() -> tuple[LinearForm, dict[str, torch.Tensor], int, int]:
    rows, columns = random.randint(1, 150), random.randint(1, 300)
    form = random_form(rows, columns)
    weight = torch.randn(rows, columns)
    if form.sparsity is not None:
        weight = weight * largest_mask(weight, form)
    return form, pack_weight(weight, form), rows, columns


def fuzz_linear() -> None:
    form, stored, rows, columns = random_weight()
    layout = packed_layout(stored, form, rows, columns)
    assert layout is not None
    dense = unpack_weight(stored, form, columns, torch.float32)
    x = torch.randn(random.choice((random.randint(1, 40), random.randint(1, 300))), columns)
    y = torch.ops.llmkernel.linear(x, layout.data, layout.description, None)
    twin = twins.linear(x, dense, form.bits, form.group_size)
    torch.testing.assert_close(y, twin, rtol=1e-4, atol=1e-4 * float(twin.abs().max() + 1e-6))
    if form.bits < 16:
        with library.floating_activations():
            y = torch.ops.llmkernel.linear(x, layout.data, layout.description, None)
        twin = twins.linear(x, dense, 16, None)
        torch.testing.assert_close(y, twin, rtol=1e-4, atol=1e-4 * float(twin.abs().max() + 1e-6))


def fuzz_damage() -> None:
    """Bytes of a mask at random, values cut off: refused, or read within bounds."""
    form, stored, rows, columns = random_weight()
    stored = {name: tensor.clone() for name, tensor in stored.items()}
    if "mask" in stored and random.random() < 0.7:
        stored["mask"].view(-1)[random.randrange(stored["mask"].numel())] = random.randrange(256)
    else:
        stored["values"] = stored["values"].flatten()[: random.randint(0, stored["values"].numel())].clone()
    weight, matrix, size = stored_weight(stored, form, rows, columns), library.Matrix(), ctypes.c_int64()
    assert library.NATIVE is not None
    if library.NATIVE.llmk_plan(ctypes.byref(weight), ctypes.byref(matrix), ctypes.byref(size)) is None:
        data = torch.empty(size.value, dtype=torch.uint8)
        library.NATIVE.llmk_pack(ctypes.byref(weight), ctypes.byref(matrix), data.data_ptr(), library.threads())


def fuzz_prompt() -> None:
    """A prompt in two pieces, some of it padding, through a small floating model of its own shape."""
    key_value_heads, group = random.randint(1, 3), random.randint(1, 4)
    layers, head_dim = random.randint(1, 3), 2 * random.randint(1, 40)
    config = LLMKernelConfig(
        vocab_size=random.randint(5, 90),
        hidden_size=random.randint(1, 9) * 8,
        intermediate_size=random.randint(1, 150),
        num_hidden_layers=layers,
        num_attention_heads=key_value_heads * group,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        layer_types=random.choices(("full_attention", "sliding_attention"), k=layers),
        sliding_window=random.randint(2, 100),
        mlp_gated=random.random() < 0.7,
        qk_norm=random.random() < 0.3,
        initializer_range=0.2,
    )
    model: Any = LLMKernelForCausalLM(config).eval().requires_grad_(False)
    batch, length = random.randint(1, 4), random.randint(2, 200)
    ids, cut = torch.randint(config.vocab_size, (batch, length)), random.randint(1, length - 1)
    padding = random.choice((0, 0, random.randrange(cut)))
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :padding] = 0
    rounding = random_rounding(head_dim)

    def read() -> torch.Tensor:
        cache = DynamicCache(config=config) if rounding is None else IntegerCache(config, *rounding)
        first = model(ids[:, :cut], attention_mask=mask[:, :cut], past_key_values=cache, use_cache=True).logits
        second = model(ids[:, cut:], attention_mask=mask, past_key_values=cache, use_cache=True).logits
        return torch.cat((first, second), dim=1)[:, padding:]

    with disabled():
        expected = read()
    if rounding is None:
        torch.testing.assert_close(read(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    else:  # few new tokens see themselves rounded
        assert (read() - expected).norm() <= (0.1 if rounding[0] == 8 else 1) * expected.norm()


def random_rounding(head_dim: int) -> tuple[int, int] | None:
    """Bits and group size of a cache of integers, or none."""
    if random.random() < 0.5:
        return None
    return random.choice((8, 4)), random.choice([size for size in range(1, head_dim + 1) if head_dim % size == 0])


if __name__ == "__main__":
    main()
