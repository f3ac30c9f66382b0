"""Linears as bitsandbytes stores them: which of a model's are, what is stored for one, and both directions.

nf4 and fp4 are codes of 4 bits with one scale for 64 values (Dettmers et al. 2023, arXiv 2305.14314); with double
quantization the scales are codes themselves. int8 has one scale a row (LLM.int8, Dettmers et al. 2022, arXiv
2208.07339). Everything here is what transformers' own quantizer of a loaded model writes, bit for bit.

Shapes: O out_features, I in_features.
"""

import json
import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from ..model.checks_llm_kernel import CAST_FILTER, CAST_LOGGER, check_quantized_tensors, stored_tensors

QUANT_TYPES = ("nf4", "fp4", "int8")
BLOCK, NESTED_BLOCK = 64, 256  # values of a scale, and scales of a scale
TABLE, NESTED_TABLE = 16, 256  # values that a code stands for
UNQUANTIZED = ("lm_head", "score", "qa_outputs")  # where a configuration does not name what is left out
OWN_TENSORS = re.compile(r"(.+)\.(weight\.(absmax|quant_map|quant_state\..+)|SCB|weight_format)")
Tensors = dict[str, tuple[tuple[int, ...] | None, str | None]]


@dataclass(frozen=True)
class BitsAndBytes:
    """How bitsandbytes quantizes a model: a `quantization_config` of `config.json`.

    Args:
        quant_type: `"nf4"`, `"fp4"` or `"int8"`.
        double_quant: whether scales of 4-bit weights are quantized too.
        compute_dtype: name of the dtype that 4-bit linears multiply in.
        skipped: modules that stay floating, by name or the end of one.
        threshold: inputs above it are multiplied in 16 bits by int8 linears.
    """

    quant_type: str
    double_quant: bool = False
    compute_dtype: str = "float32"
    skipped: tuple[str, ...] = UNQUANTIZED
    threshold: float = 6.0

    @classmethod
    def of(cls, config: Any) -> "BitsAndBytes | None":
        """That of a model's configuration; `None` where bitsandbytes has nothing to do with it, as transformers says.

        What is left out is as `BitsAndBytesConfig` has it by default.
        """
        asked = getattr(config, "quantization_config", None)
        asked = asked if isinstance(asked, dict | None) else asked.to_dict()
        if not asked or not (asked.get("load_in_4bit") or asked.get("load_in_8bit")):
            return None
        skipped = asked.get("llm_int8_skip_modules")
        return cls(
            quant_type="int8" if asked.get("load_in_8bit") else asked.get("bnb_4bit_quant_type") or "fp4",
            double_quant=bool(asked.get("load_in_4bit") and asked.get("bnb_4bit_use_double_quant")),
            compute_dtype=str(asked.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch."),
            skipped=UNQUANTIZED if skipped is None else tuple(skipped),
            threshold=asked.get("llm_int8_threshold", 6.0),
        )

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` that transformers reads."""
        return BitsAndBytesConfig(
            load_in_8bit=not self.is_four_bit,
            load_in_4bit=self.is_four_bit,
            llm_int8_threshold=self.threshold,
            llm_int8_skip_modules=list(self.skipped),
            bnb_4bit_quant_type=self.quant_type if self.is_four_bit else "fp4",
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype,
        ).to_dict()

    @property
    def is_four_bit(self) -> bool:
        return self.quant_type != "int8"

    def computes(self, in_features: int) -> bool:
        """Whether bitsandbytes computes what it stores for a linear of so many inputs, see `decodes_wrongly`."""
        return in_features % BLOCK == 0 if self.is_four_bit else in_features > 1

    def quantizes(self, name: str) -> bool:
        """Whether a linear is quantized, by its name in the model."""
        return should_convert_module(name, list(self.skipped))

    @property
    def name(self) -> str:
        """It in a column of a table."""
        return f"bnb {self.quant_type}{' double' if self.double_quant else ''}"

    @property
    def words(self) -> str:
        """It in a sentence."""
        return f"bitsandbytes {self.quant_type}{' with double quantization' if self.double_quant else ''}"

    def stored_tensors(self, out_features: int, in_features: int, dtype: torch.dtype | None = None) -> Tensors:
        """Names, shapes and dtypes of what is stored for a linear, bias apart.

        The state's length depends on the dtype that the floating weight had; without it that shape is `None`. With
        double quantization it depends on a number too, so that a few bytes more or less may be stored.
        """
        shape = (out_features, in_features)
        if not self.is_four_bit:
            return {"weight": (shape, "int8"), "SCB": ((out_features,), "float32"), "weight_format": ((), "uint8")}
        scales = math.ceil(math.prod(shape) / BLOCK)
        state = {"quant_type": self.quant_type, "blocksize": BLOCK, "dtype": str(dtype)[6:], "shape": shape}
        if self.double_quant:
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.12345678901234567}
        length = None if dtype is None else (len(json.dumps(state)),)
        tensors: Tensors = {
            "weight": ((math.ceil(math.prod(shape) / 2), 1), "uint8"),
            "weight.absmax": ((scales,), "uint8" if self.double_quant else "float32"),
            "weight.quant_map": ((TABLE,), "float32"),
            f"weight.quant_state.bitsandbytes__{self.quant_type}": (length, "uint8"),
        }
        if self.double_quant:
            tensors |= {
                "weight.nested_absmax": ((math.ceil(scales / NESTED_BLOCK),), "float32"),
                "weight.nested_quant_map": ((NESTED_TABLE,), "float32"),
            }
        return tensors

    def check_range(self, name: str, weight: torch.Tensor) -> None:
        """Raises `ValueError` for a weight `[O, I]` with values beyond the range that a linear `name` computes in."""
        dtype = self.compute_dtype if self.is_four_bit else "float16"
        if not weight.to(getattr(torch, dtype)).isfinite().all():
            remedy = "set compute_dtype to 'bfloat16'" if self.is_four_bit else "choose quant_type 'nf4'"
            raise ValueError(
                f"bitsandbytes: {name} has values up to {float(weight.abs().max()):.4g}, and {self.words} computes in "
                f"{dtype}, whose largest number is {torch.finfo(getattr(torch, dtype)).max:.5g}; {remedy}."
            )

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is stored for a floating weight `[O, I]`, by suffix."""
        from bitsandbytes import functional

        if not self.is_four_bit:
            codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
            return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        codes, state = functional.quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=self.double_quant, quant_type=self.quant_type
        )
        return {"weight": codes, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}

    def linear(self, name: str, plain: nn.Linear, stored: Mapping[str, torch.Tensor]) -> nn.Module:
        """The module that computes with what is stored for a linear; takes the bias of the plain one.

        Raises:
            ValueError: with the linear's `name`, a tensor that is missing or damaged.
        """
        import bitsandbytes

        modules: Any = bitsandbytes.nn
        found = {tensor.name: tensor for tensor in stored_tensors(dict(stored), [])}
        whole = (plain.out_features, plain.in_features)
        check_quantized_tensors(name, whole, self.quant_type, found, stored.__getitem__)
        shape = {"input_features": plain.in_features, "output_features": plain.out_features, "bias": False}
        logging.getLogger(CAST_LOGGER).addFilter(CAST_FILTER)
        if self.is_four_bit:
            compute = getattr(torch, self.compute_dtype)
            linear = modules.Linear4bit(**shape, compute_dtype=compute, device="meta")
            linear.support_avx512bf16_for_cpu = False  # what it would compute otherwise is another weight's
            parts = {name.removeprefix("weight."): tensor for name, tensor in stored.items() if name != "weight"}
            linear.weight = modules.Params4bit.from_prequantized(
                stored["weight"], parts, device=stored["weight"].device, module=linear
            )
        else:
            linear = modules.Linear8bitLt(**shape, has_fp16_weights=False, threshold=self.threshold, device="meta")
            linear.weight = modules.Int8Params(
                stored["weight"], requires_grad=False, CB=stored["weight"], SCB=stored["SCB"]
            )
        linear.bias = plain.bias
        return linear.eval()


def encoded_linears(keys: Collection[str]) -> dict[str, list[str]]:
    """Names of linears that are stored so, each with the names of its tensors, bias apart; one may lack some."""
    names = dict.fromkeys(match[1] for match in map(OWN_TENSORS.fullmatch, keys) if match)
    return {name: [key for key in keys if key.startswith((f"{name}.weight", f"{name}.SCB"))] for name in names}
