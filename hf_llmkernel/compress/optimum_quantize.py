"""Quantization by Optimum's conventions: `LLMKernelQuantizer` and its config, which is saved beside the model it made.

A method is one of the stage `quantize` (`rtn`, `gptq`, …), or `bnb-nf4`, `bnb-fp4`, `bnb-int8` of the stage
`bitsandbytes`.

Reading order: the config -> the stage it stands for -> the quantizer -> what is measured.
"""

from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint.bitsandbytes import QUANT_TYPES
from ..evaluate.inventory import inspect
from .block import LINEARS
from .check import check_places
from .optimum_bases import CheckpointQuantizer, RecipeConfig, given
from .pipeline import compress
from .quantize.stage import METHODS, remedy_for
from .recipe import Recipe

BITSANDBYTES = {f"bnb-{quant_type}": quant_type for quant_type in QUANT_TYPES}
PER_ROW = -1  # as other tools write a group that is a whole row


class LLMKernelQuantizationConfig(RecipeConfig):
    """How to quantize, and once it is done what was reached.

    Args:
        method: one of the stage `quantize`, or `"bnb-nf4"`, `"bnb-fp4"`, `"bnb-int8"`.
        bits: 8 or 4; a method of bitsandbytes says it already.
        group_size: columns that share a scale; -1 is one scale a row. By default 64.
        symmetric: a grid around zero, the default; else zero points are stored too.
        embeddings: whether the token embedding and the head are quantized too.
        settings: a table of whatever else the stage takes: `act_order`, `fold`, `scale_dtype`, …; `double_quant` and
            `compute_dtype` of bitsandbytes.
        op_names, excluded_op_names, layers, dtype, calibration, evaluation, recipe: see `RecipeConfig`.
        measured_bytes: of all tensors of the result.
        measured_bits_per_weight: all that is stored of the blocks' linears, over the weights that they stand for.

    Raises:
        ValueError: an unknown name or a setting outside its range, with the remedy.
    """

    CONFIG_NAME = "quantization_config.json"
    FULL_CONFIGURATION_FILE = "quantization_config.json"
    kind = "quantization config"
    measured = ("measured_bytes", "measured_bits_per_weight")
    method: str = "rtn"
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    embeddings: bool = False
    settings: dict[str, Any] | None = None
    op_names: list[str] | None = None
    excluded_op_names: list[str] | None = None
    layers: list[int] | None = None
    dtype: str | None = None
    calibration: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    recipe: dict[str, Any] | Recipe | None = None
    measured_bytes: int | None = None
    measured_bits_per_weight: float | None = None

    def _stage_name(self) -> str:
        return "bitsandbytes" if self.method in BITSANDBYTES else "quantize"

    def _stage_settings(self) -> dict[str, Any]:
        shared = {**self._chosen_linears(), "layers": self.layers, "embeddings": self.embeddings}
        shared |= self.settings or {}
        if self.method in BITSANDBYTES:
            return given({"quant_type": BITSANDBYTES[self.method], **shared})
        own = {"method": self.method, "bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        row = {"group_size": None} if self.group_size == PER_ROW else {}
        return {**given({**own, **shared}), **row}

    def _check(self) -> None:
        if self.recipe is not None:
            return
        known = [*METHODS, *BITSANDBYTES]
        if self.method not in known:
            raise ValueError(f"method={self.method!r}: must be one of {known}{remedy_for(self.method)}.")
        if isinstance(self.group_size, int) and self.group_size < 1 and self.group_size != PER_ROW:
            raise ValueError(f"group_size={self.group_size}: must be at least 1, or {PER_ROW} for one scale a row.")
        self._check_names()
        if not isinstance(self.settings, dict | None):
            raise ValueError(f"settings={self.settings!r}: must be a table, such as {{'act_order': True}}.")
        if twice := sorted({*self.setting_names(), "include", "exclude"} & {*(self.settings or {})}):
            raise ValueError(f"settings: {twice} are no further settings; give them beside it, or as op_names.")
        if self.method in BITSANDBYTES:
            self._check_bitsandbytes()
        elif self.bits is None:
            raise ValueError("bits: is missing; give --bits 8 or 4, or bits: 8 or 4 in a recipe.")
        self._check_calibration()

    def _check_calibration(self) -> None:
        """Raises `ValueError` for calibration that nothing would look at; what is no table the recipe refuses."""
        folds = (self.settings or {}).get("fold") is not None
        reads = folds or (self.method in METHODS and METHODS[self.method].needs_data)
        if isinstance(self.calibration, dict) and self.calibration and not reads:
            raise ValueError(
                f"calibration={self.calibration!r}: method={self.method!r} looks at no activations; leave it out, or "
                f"choose a method that does: {[name for name, method in METHODS.items() if method.needs_data]}."
            )

    def _check_bitsandbytes(self) -> None:
        bits = 8 if self.method == "bnb-int8" else 4
        if self.bits not in (None, bits):
            raise ValueError(f"bits={self.bits!r}: method={self.method!r} has {bits}; leave it out.")
        for name in ("group_size", "symmetric"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)!r}: method={self.method!r} has its own; leave it out.")


class LLMKernelQuantizer(CheckpointQuantizer):
    """Quantizes a checkpoint of this family, or of one that `convert_checkpoint` knows, block by block.

    Args:
        model_or_path: a folder, Hub id or `.gguf` file, or a model in memory.
        tokenizer: for the texts of calibration and evaluation; by default the checkpoint's own.
    """

    def quantize(
        self,
        save_dir: str | Path,
        file_prefix: str | None = None,
        quantization_config: LLMKernelQuantizationConfig | Recipe | dict[str, Any] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> LLMKernelQuantizationConfig:
        """Writes the quantized checkpoint, its recipe, and `quantization_config.json` with what was reached.

        Args:
            save_dir: a new or empty folder. Interrupted, the same call goes on where it was.
            file_prefix: must be `None`; the files have the names that `from_pretrained` knows.
            quantization_config: a config, a ready recipe, or the table of either; or `settings` of a config by name.
            progress: whether to show bars on stderr.

        Returns:
            The config with what was measured, as it is saved; the one given stays as it was.

        Raises:
            ValueError: bad input, as `compress` says.
        """
        self.check_file_prefix(file_prefix)
        check_places(self.model_or_path, save_dir)
        if quantization_config is not None and settings:
            raise ValueError(f"quantization_config: says all, but {sorted(settings)} are given too; leave one out.")
        config = LLMKernelQuantizationConfig.read(settings if quantization_config is None else quantization_config)
        finish = partial(_save_measured, config, progress)
        compress(self.model_or_path, config.to_recipe(), save_dir, self.tokenizer, progress, finish=finish)
        return LLMKernelQuantizationConfig.from_pretrained(save_dir)


def _save_measured(config: LLMKernelQuantizationConfig, progress: bool, folder: Path) -> None:
    """Writes a config beside the checkpoint it made, with what was reached there."""
    inventory = inspect(folder, verify=True, progress=progress)
    linears = [entry for entry in inventory.entries if entry.name.rpartition(".")[2] in LINEARS]
    stored, weights = sum(entry.bytes for entry in linears), sum(prod(entry.shape) for entry in linears)
    reached = config.with_measured(measured_bytes=inventory.bytes, measured_bits_per_weight=8 * stored / weights)
    reached.save_pretrained(folder)
