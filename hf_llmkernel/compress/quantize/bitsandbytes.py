"""`bitsandbytes`: linears as bitsandbytes stores them, the last stage of a recipe.

What it writes is what transformers writes of a model that was loaded with a `quantization_config`, bit for bit, but one
tensor at a time. It needs no data and changes no shape: the linears are encoded when the result is written.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch

from ...checkpoint.bitsandbytes import QUANT_TYPES, BitsAndBytes
from ...model.checks_llm_kernel import packed_names
from ...model.configuration_llm_kernel import BITSANDBYTES_SETTINGS, LLMKernelConfig
from ..block import Block, matrix_form, matrix_names, matrix_shape, module_path
from ..inputs import InputStatistic
from ..registry import register
from ..stage import Stage, refuse_form

COMPUTE_DTYPES = BITSANDBYTES_SETTINGS["bnb_4bit_compute_dtype"]


@register("bitsandbytes")
@dataclass(frozen=True, kw_only=True)
class StoreBitsAndBytes(Stage):
    """Stores dense and low-rank linears as bitsandbytes does.

    Linears that it would not compute as it stores them stay floating: of 4 bits those whose inputs 64 does not divide.

    Args:
        quant_type: `"nf4"`, `"fp4"` or `"int8"` (LLM.int8).
        double_quant: whether the scales of 4-bit weights are quantized too.
        compute_dtype: that 4-bit linears multiply in; by default the model's.
    """

    quant_type: str = "nf4"
    double_quant: bool = False
    compute_dtype: str | None = None

    writes_whole: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type={self.quant_type!r}: must be one of {list(QUANT_TYPES)}.")
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant={self.double_quant!r}: must be true or false.")
        if self.compute_dtype not in (None, *COMPUTE_DTYPES):
            raise ValueError(f"compute_dtype={self.compute_dtype!r}: must be one of {list(COMPUTE_DTYPES)}.")
        if self.quant_type == "int8" and (self.double_quant or self.compute_dtype):
            raise ValueError("quant_type='int8': double_quant and compute_dtype are of 4-bit types; leave them out.")

    @property
    def settings(self) -> BitsAndBytes:
        """Of all that it works on."""
        return BitsAndBytes(self.quant_type, self.double_quant, self.compute_dtype or "float32", skipped=())

    def plan(self, layer: LLMKernelConfig, target: Any = None) -> dict[str, Any]:
        for name in matrix_names(layer):
            if matrix_form(layer, name).is_packed:
                refuse_form("bitsandbytes", layer, name, "start from a checkpoint of dense and low-rank linears.")
        chosen = self.chosen(matrix_names(layer))
        stay = [name for name in chosen if not self.settings.computes(matrix_shape(layer, name)[1])]
        return {"matrices": [name for name in chosen if name not in stay], **({"stay_floating": stay} if stay else {})}

    def check_result(self, result: list[dict[str, Any]]) -> None:
        if any(variant["matrices"] for variant in result):
            return
        stay = list(dict.fromkeys(name for variant in result for name in variant.get("stay_floating", [])))
        raise ValueError(
            f"bitsandbytes: quantizes nothing, for quant_type={self.quant_type!r} takes linears whose inputs "
            f"{'64 divides' if self.settings.is_four_bit else 'are more than one'}, and {' '.join(stay) or 'none'} "
            "are all that was chosen; choose another quant_type, or the stage quantize."
        )

    def apply(self, block: Block, site: str, inputs: InputStatistic | None, target: Any = None) -> torch.Tensor | None:
        return None

    def plan_whole(self, config: LLMKernelConfig) -> None:
        if packed := packed_names(config):
            raise ValueError(f"bitsandbytes: {packed[0]} is sparse or integer, which it does not load; leave it out.")
        layers = enumerate(cast(list[LLMKernelConfig], config.per_layer_config))
        skipped = [
            f"layers.{index}.{module_path(name)}"
            for index, layer in layers
            for name in matrix_names(layer)
            if not self.covers(index) or name not in self.plan(layer)["matrices"]
        ]
        compute_dtype = self.compute_dtype or str(config.dtype).removeprefix("torch.")
        settings = replace(self.settings, compute_dtype=compute_dtype, skipped=(*skipped, "lm_head"))
        config.quantization_config = settings.to_config()
