# Copyright 2026 The hf_llmkernel authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What loading, training and quantizing refuse, and what of bitsandbytes is kept from doing harm.

Reading order: types of stored tensors -> configurations -> training and adapters -> linears of bitsandbytes, as they
are made, as they are stored, as they compute.
"""

import json
import logging as stdlib_logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_llm_kernel import BITSANDBYTES_SETTINGS, LinearForm, LLMKernelConfig, check_bitsandbytes
from .linear_llm_kernel import LowRankLinear, PackedWeight

logger = logging.get_logger(__name__)


STORED_TYPES = {  # as safetensors names them
    torch.int8: ("I8",),
    torch.uint8: ("U8",),
    torch.float16: ("F16",),
    torch.bfloat16: ("BF16",),
    torch.float32: ("F32",),
}
FLOATING_TYPES = ("F16", "BF16", "F32", "F64")


def check_stored_types(model: PreTrainedModel, state_dict: dict | None, files: list[str]) -> None:
    """Raises `ValueError` for a tensor of another type than its form, and for a weight file that cannot be read.

    Integers, scales and zero points have the type of their form; a weight may be of any floating type.
    """
    body = f"{model.base_model_prefix}."
    wanted = {}
    for name, tensor in model.state_dict().items():
        exact = not tensor.is_floating_point() or name.endswith((".scales", ".zero_points"))
        wanted[name.removeprefix(body)] = STORED_TYPES[tensor.dtype] if exact else FLOATING_TYPES
    for tensor in stored_tensors(state_dict, files):
        types = wanted.get(tensor.name.removeprefix(body), (tensor.type,))
        if tensor.type not in types:
            where = f"{tensor.file}: " if tensor.file else ""
            raise ValueError(
                f"{where}{tensor.name}: is stored as {tensor.type}, by its form in config.json it is "
                f"{' or '.join(types)}; these are not files of one checkpoint: fetch or write it again."
            )


class StoredTensor(NamedTuple):
    """A tensor that will be loaded, from a file or `""`: a state dict."""

    file: str
    name: str
    type: str  # as safetensors names it
    values: int


def stored_tensors(state_dict: dict | None, files: list[str]) -> Iterator[StoredTensor]:
    """All tensors that will be loaded, but for those of files that are not safetensors."""
    if state_dict is not None:
        names = {dtype: types[0] for dtype, types in STORED_TYPES.items()}
        for name, tensor in state_dict.items():
            kind = names.get(tensor.dtype, "F64" if tensor.is_floating_point() else str(tensor.dtype))
            yield StoredTensor("", name, kind, tensor.numel())
        return
    for file in filter(lambda file: str(file).endswith(".safetensors"), files):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                slices = {name: tensors.get_slice(name) for name in names}
                found = [(name, part.get_dtype(), math.prod(part.get_shape())) for name, part in slices.items()]
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}; the file is damaged, fetch or write it again.") from None
        for name, kind, values in found:
            yield StoredTensor(str(file), name, kind, values)


def refuse_keys(fault: str, keys: list[str]) -> None:
    """Raises `ValueError` for tensors of a compressed checkpoint that do not fit its configuration."""
    if keys:
        raise ValueError(
            f"{min(keys)}: {fault}, in a compressed checkpoint ({len(keys)} such tensors); config.json and the weight "
            "files are incomplete or not of one checkpoint: fetch or write it again."
        )


def refuse_quantization_config(config: LLMKernelConfig) -> None:
    """Raises `ValueError` where another quantizer, bitsandbytes say, is asked for what it cannot do.

    That is: quantizing sparse or integer linears, and settings of bitsandbytes that end with an error much later.
    """
    asked = getattr(config, "quantization_config", None)
    if asked is None:
        return
    if packed := packed_names(config):
        raise ValueError(
            f"quantization_config: {packed[0]} is already stored sparse or integer; load without a "
            "quantization_config, or start from a dense or low-rank checkpoint."
        )
    check_bitsandbytes(asked if isinstance(asked, dict) else asked.to_dict())


# Where a configuration is looked for, of the arguments of `from_pretrained`.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def refuse_other_quantization(stored, asked) -> None:
    """Raises `ValueError` where a checkpoint that bitsandbytes quantized is to be quantized by it in another way.

    What says how it computes (compute dtype, threshold, offload) is the library's to take or to leave.
    """
    stored, asked = (given if isinstance(given, dict | None) else given.to_dict() for given in (stored, asked))
    if stored is None or asked.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return  # the library refuses another method
    is_stored, is_asked = bitsandbytes_name(stored), bitsandbytes_name(asked)
    if is_stored != is_asked:
        raise ValueError(
            f"quantization_config: asks for {is_asked}, and the checkpoint is stored as {is_stored}; leave it out, or "
            "start from the floating checkpoint."
        )


def bitsandbytes_name(settings: Mapping) -> str:
    """What a `quantization_config` of bitsandbytes stores, in words: `nf4 with double quantization`."""
    if settings.get("load_in_8bit"):
        return "int8"
    nested = " with double quantization" if settings.get("bnb_4bit_use_double_quant") else ""
    return f"{settings.get('bnb_4bit_quant_type', 'fp4')}{nested}"


class OncePerProcess(stdlib_logging.Filter):
    """Lets a message through once, which a library would give for every linear; all others always."""

    def __init__(self, beginning: str):
        super().__init__()
        self.beginning = beginning
        self.given = False

    def filter(self, record) -> bool:
        if not str(record.msg).startswith(self.beginning):
            return True
        first, self.given = not self.given, True
        return first


CAST_LOGGER = "bitsandbytes.autograd._functions"
CAST_FILTER = OncePerProcess("MatMul8bitLt: inputs will be cast")


def refuse_fixed_integers(model: nn.Module):
    """Raises `ValueError` where norms and floating linears would be trained around integers that cannot be."""
    modules = dict(model.named_modules())
    adapted = any(hasattr(module, "base_layer") for module in modules.values())
    if adapted or not any(parameter.requires_grad for parameter in model.parameters()):
        return
    for name, module in modules.items():
        if isinstance(module, PackedWeight) and module.form.bits < 16:
            raise ValueError(
                f"{name}: stores integers, which do not train, while the weights around it would; attach adapters "
                "(peft), train what `llmkernel convert MODEL OUTPUT --dequantize` writes, or freeze the body with "
                "`model.base_model.requires_grad_(False)` to train a head alone."
            )


def refuse_adapters_within_adapters(model: nn.Module, target: str) -> None:
    """Raises `ValueError` where a factor is looked for in an adapter on its low-rank linear: both are linears.

    peft's "all-linear" takes every `nn.Linear`, and has wrapped the low-rank one when it comes to the factors.
    """
    modules = dict(model.named_modules())
    name, _, factor = target.rpartition(".")
    if factor not in ("a", "b") or not isinstance(modules.get(f"{name}.base_layer"), LowRankLinear):
        return
    paths = {path.removesuffix(".base_layer"): module for path, module in modules.items() if "_proj" in path}
    low_rank = [path for path, module in paths.items() if isinstance(module, LowRankLinear)]
    leaves = {path.rpartition(".")[2] for path in low_rank}
    others = {path.rpartition(".")[2] for path in paths.keys() - set(low_rank)}
    excluded = sorted(leaves) if not leaves & others else low_rank
    raise ValueError(
        f"{target}: an adapter is on {name}, the low-rank linear that it is a factor of, already; on a newly loaded "
        f"model leave these out: LoraConfig(target_modules='all-linear', exclude_modules={excluded})."
    )


def quantized_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linears of a model that bitsandbytes quantizes, by name."""
    own = {name: module._parameters.get("weight") for name, module in model.named_modules()}
    kinds = ("Params4bit", "Int8Params")  # by name, for bitsandbytes need not be installed
    return {name: model.get_submodule(name) for name, weight in own.items() if type(weight).__name__ in kinds}


def decodes_wrongly(linear: nn.Module) -> bool:
    """Whether bitsandbytes computes something else than what it stores for a linear of this many inputs.

    With AVX512 it decodes 4-bit rows as if each began a new block of 64, and torch's product of int8 matrices is
    wrong for one column.
    """
    block = getattr(linear.weight, "blocksize", None)
    return linear.in_features == 1 if block is None else linear.in_features % block != 0


def keep_floating(model: PreTrainedModel, quantizer) -> None:
    """Makes linears plain again that should not be quantized, before they are loaded, and reports them.

    These are the heads of tasks, as new ones are to be trained, tied ones, factors of embeddings, and those of
    `decodes_wrongly`, unless the checkpoint has them quantized already.
    """
    linears = quantized_linears(model)
    tied = {name.rpartition(".")[0] for name in model.all_tied_weights_keys}
    looked_up = set(model.get_input_embeddings().modules())
    odd = [] if quantizer.pre_quantized else [name for name, module in linears.items() if decodes_wrongly(module)]
    head = model.get_output_embeddings()
    tasks = [name for name, module in model.named_children() if name in linears and module is not head]
    factors = [name for name, module in linears.items() if module in looked_up]
    kept = {*odd, *tasks, *factors, *(tied & linears.keys())}
    for name in kept:
        plain = linears[name]
        with torch.device("meta"):
            linear = nn.Linear(plain.in_features, plain.out_features, plain.bias is not None, dtype=model.dtype)
        model.set_submodule(name, linear)
    if not quantizer.pre_quantized and not linears.keys() - kept:
        refuse_nothing_quantized(odd)
    if odd:
        logger.warning(
            f"bitsandbytes: {len(odd)} linears stay {model.dtype}, it would not compute what it stores; 4 bits take "
            f"in_features that 64 divides, int8 more than one: {some_names(odd)}."
        )
    if kept:  # for whoever reads the configuration that is saved
        body = f"{model.base_model_prefix}."
        names = {name.removeprefix(body) for name in (*quantizer.modules_to_not_convert, *kept)}
        quantizer.modules_to_not_convert = quantizer.quantization_config.llm_int8_skip_modules = sorted(names)


def refuse_nothing_quantized(odd: list[str]) -> None:
    """Raises `ValueError` for a `quantization_config` that leaves no linear; `odd` are those of `decodes_wrongly`."""
    reason = "modules that are not to be converted are all there are"
    if odd:
        reason = f"4 bits take in_features that 64 divides, int8 more than one, and there are only {some_names(odd)}"
    raise ValueError(f"quantization_config: quantizes nothing, for {reason}; load without it, or by another.")


def some_names(names: list[str]) -> str:
    """The first three of the names of linears, and how many of each kind there are."""
    if len(names) <= 3:
        return ", ".join(names)
    kinds = Counter(re.sub(r".*layers\.\d+\.(self_attn|mlp)\.", "", name) for name in names)
    return f"{', '.join(names[:3])}, … ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})"


def cast_floating(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts what a quantized checkpoint has floating: the library leaves weights in the dtype they are stored in."""
    weights = {id(linear.weight) for linear in quantized_linears(model).values()}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in weights:
            parameter.data = parameter.data.to(dtype)


def check_stored_quantized(model: PreTrainedModel, state_dict: dict | None, files: list[str]) -> None:
    """Raises `ValueError` where what a checkpoint has of a linear that bitsandbytes quantized is not whole."""
    body = f"{model.base_model_prefix}."
    stored = {tensor.name.removeprefix(body): tensor for tensor in stored_tensors(state_dict, files)}

    def read(path: str) -> torch.Tensor:
        tensor = stored[path]
        if state_dict is not None:
            return state_dict[tensor.name]
        with safe_open(tensor.file, framework="pt") as tensors:
            return tensors.get_tensor(tensor.name)

    for name, linear in quantized_linears(model).items() if stored else ():
        weight, path = linear.weight, name.removeprefix(body)
        if getattr(weight, "has_fp16_weights", False):
            continue
        kind = weight.quant_type if type(weight).__name__ == "Params4bit" else "int8"
        own = {key: tensor for key, tensor in stored.items() if key.startswith(f"{path}.")}
        found = {key.removeprefix(f"{path}."): tensor for key, tensor in own.items()}
        shape = (linear.out_features, linear.in_features)
        check_quantized_tensors(name, shape, kind, found, lambda suffix, path=path: read(f"{path}.{suffix}"))


def check_quantized_tensors(
    name: str, shape: tuple[int, int], kind: str, found: Mapping[str, StoredTensor], read: Callable[[str], torch.Tensor]
) -> None:
    """Raises `ValueError` where a tensor that bitsandbytes stores for a linear is missing, of another shape or type.

    Args:
        name: of the linear.
        shape: O and I.
        kind: `"nf4"`, `"fp4"` or `"int8"`.
        found: its stored tensors, by suffix.
        read: one of these.
    """
    state = f"weight.quant_state.bitsandbytes__{kind}"
    wanted = {"SCB": (shape[0], "F32")}
    if kind != "int8":
        if state not in found:
            refuse_quantized(f"{name}.{state}", "missing")
        wanted = four_bit_tensors(f"{name}.{state}", read(state), kind, shape)
    for suffix in ("weight", *wanted):
        if suffix not in found:
            refuse_quantized(f"{name}.{suffix}", "missing")
    for suffix, (count, stored_type) in wanted.items():
        tensor = found[suffix]
        if tensor.values != count:
            refuse_quantized(f"{name}.{suffix}", f"has {tensor.values} values, not the {count} of its linear")
        if tensor.type != stored_type:
            refuse_quantized(f"{name}.{suffix}", f"is stored as {tensor.type}, and bitsandbytes has {stored_type}")
    for suffix, table in four_bit_tables(kind).items() if kind != "int8" else ():
        if suffix in wanted and not torch.allclose(read(suffix).flatten(), table, atol=1e-5):
            refuse_quantized(f"{name}.{suffix}", "has other values than those its codes stand for")


@cache
def four_bit_tables(kind: str) -> dict[str, torch.Tensor]:
    """What codes stand for: `[16]` of 4-bit weights, `[256]` of their scales; bitsandbytes has but one of each."""
    functional = import_module("bitsandbytes.functional")  # which is there, or nothing would have been quantized
    return {
        "weight.quant_map": functional.get_4bit_type(kind, device="cpu"),
        "weight.nested_quant_map": functional.create_dynamic_map(),
    }


def four_bit_tensors(name: str, state: torch.Tensor, kind: str, shape: tuple[int, int]) -> dict[str, tuple[int, str]]:
    """How many values of which type bitsandbytes stores beside 4-bit codes, by suffix, as the state of a linear says.

    Args:
        name: of the state.
        state: bytes of a JSON object.
        kind, shape: of the linear.

    Raises:
        ValueError: a state that cannot be read, or is not of the linear.
    """
    try:
        said = json.loads(bytes(state.tolist()))
    except (ValueError, TypeError):  # no bytes, no text, no JSON
        said = None
    if not isinstance(said, dict):
        refuse_quantized(name, "is no JSON object")
    nested = "nested_blocksize" in said
    expected = {
        "quant_type": (kind,),
        "blocksize": FOUR_BIT_BLOCKS,
        "dtype": tuple(BITSANDBYTES_SETTINGS["bnb_4bit_compute_dtype"]),
        "shape": (list(shape),),
        **({"nested_blocksize": (NESTED_BLOCK,), "nested_dtype": ("float32",)} if nested else {}),
    }
    for field, legal in expected.items():
        if said.get(field) not in legal:
            refuse_quantized(name, f"{field}={said.get(field)!r} is not {' or '.join(map(str, legal))}")
    scales = math.ceil(math.prod(shape) / said["blocksize"])
    tensors = {"weight.absmax": (scales, "U8" if nested else "F32"), "weight.quant_map": (16, "F32")}
    if not nested:
        return tensors
    offset = said.get("nested_offset")
    if not isinstance(offset, float) or not math.isfinite(offset):
        refuse_quantized(name, f"nested_offset={offset!r} is no finite number")
    count = math.ceil(scales / NESTED_BLOCK)
    return {**tensors, "weight.nested_absmax": (count, "F32"), "weight.nested_quant_map": (256, "F32")}


FOUR_BIT_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # values that share a scale
NESTED_BLOCK = 256  # scales that share one


def refuse_quantized(name: str, fault: str) -> None:
    """Raises `ValueError` for a tensor of a checkpoint that bitsandbytes quantized."""
    raise ValueError(
        f"{name}: {fault}; the weight files and config.json, with its quantization_config, are not whole or not of one "
        "checkpoint: fetch or write it again."
    )


def check_quantized(model: nn.Module) -> None:
    """Raises `ValueError` where what bitsandbytes has loaded for a linear is not finite or not of its shape."""
    for name, linear in quantized_linears(model).items():
        weight, shape = linear.weight, (linear.out_features, linear.in_features)
        if weight.device.type == "meta" or getattr(weight, "has_fp16_weights", False):
            continue
        if type(weight).__name__ == "Int8Params":
            scales, whole = [weight.SCB], tuple(weight.shape) == shape
        else:
            state = weight.quant_state
            scales = [state.offset, state.state2.absmax] if state.nested else [state.absmax]
            halves = weight.numel() * weight.element_size()
            whole = tuple(state.shape) == shape and halves == math.ceil(math.prod(shape) / 2)
        if not whole:
            refuse_quantized(name, f"has another shape in the weights than {list(shape)}")
        if not all(scale.isfinite().all() for scale in scales):
            refuse_quantized(name, "has scales that are not finite")


def guard_four_bit(model: nn.Module) -> None:
    """Keeps bitsandbytes from rewriting the stored 4-bit weights of this model.

    On CPUs with AVX512-BF16 its linears repack them in place in the first forward that evaluates; what is saved, merged
    or dequantized after that is another model, and shapes that 32 or 64 does not divide end with an error.

    Raises:
        ValueError: a linear whose inputs it would decode wrongly; `from_pretrained` leaves these floating.
    """
    for name, linear in quantized_linears(model).items():
        linear.support_avx512bf16_for_cpu = False
        if decodes_wrongly(linear) and linear.weight.device.type == "cpu":
            raise ValueError(
                f"{name}: in_features={linear.in_features}, with which bitsandbytes does not compute what it stores on "
                "a CPU; load the floating checkpoint with a quantization_config, which leaves this linear floating."
            )


def refuse_own_integers(config: LLMKernelConfig) -> None:
    """Raises `ValueError` where a quantizer is asked to dequantize forms of this family, which it does not know."""
    if not (packed := packed_names(config)):
        return
    if integers := packed_names(config, integer=True):
        raise ValueError(
            f"dequantize: {integers[0]} stores integers of this family, which no quantizer undoes; `llmkernel convert "
            "MODEL OUTPUT --dequantize` writes the checkpoint with floating weights in their place, which trains."
        )
    raise ValueError(f"dequantize: {packed[0]} is stored sparse, and floating; it trains as it is, leave the call out.")


def packed_names(config: LLMKernelConfig, integer: bool = False) -> list[str]:
    """Names of the linears and embeddings stored sparse or integer, or `integer` alone; factors count too."""

    def is_packed(form: LinearForm) -> bool:
        parts = [form] if form.rank is None else form.factors
        return any(part.bits < 16 if integer else part.is_packed for part in parts)

    top = {"embed_tokens": config.embed_tokens_form, "lm_head": config.lm_head_form}
    names = [name for name, form in top.items() if is_packed(LinearForm.from_dict(form))]
    for index, layer in enumerate(config.per_layer_config):
        names += [f"layers.{index}.{name}" for name in layer.linear_shapes() if is_packed(layer.linear_form(name))]
    return names


def refuse_uneven_heads(config: LLMKernelConfig, processes: int, plan: str | dict | None) -> None:
    """Raises `ValueError` where tensor parallelism would split a head between two processes.

    Args:
        processes: that share each layer.
        plan: what was asked for; one that says how attention is split is its author's.
    """
    if isinstance(plan, dict) and any("self_attn" in name for name in plan):
        return
    every = enumerate(config.per_layer_config)
    layers = {index: layer for index, layer in every if "attention" not in (layer.skip or [])}
    shared = math.gcd(*(layer.num_key_value_heads for layer in layers.values()))
    for index, layer in layers.items():
        if layer.num_key_value_heads % processes:
            counts = [str(count) for count in range(2, shared + 1) if shared % count == 0]
            start = f"start {' or '.join(counts)} processes, or use" if counts else "no number of them does; use"
            raise ValueError(
                f"tensor parallelism: layer {index} has num_attention_heads={layer.num_attention_heads} and "
                f"num_key_value_heads={layer.num_key_value_heads}, which {processes} processes cannot share evenly; "
                f"{start} device_map or data parallelism."
            )
