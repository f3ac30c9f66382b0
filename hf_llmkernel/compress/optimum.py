"""Pruning by Optimum's conventions: an object from `from_pretrained`, a config saved beside the model it made.

The config's names are those of Intel Neural Compressor, which Optimum pruned with.

Reading order: the config -> the stage it stands for -> its checks -> the pruner -> what is measured.
"""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from ..convert.gguf_config import gguf_config
from ..convert.gguf_file import GGUFFile
from ..convert.incoming import read_config_fields
from ..convert.source import locate_source
from ..evaluate.inventory import Entry, inspect
from ..evaluate.layout import shape_config, slots, stored_values
from .block import LINEARS
from .check import check_places
from .optimum_bases import CheckpointQuantizer, RecipeConfig, given
from .pipeline import compress
from .prune.stage import METHODS as GROUP_METHODS
from .recipe import Recipe
from .sparsify.mask import kept_of_group
from .sparsify.stage import METHODS as WEIGHT_METHODS

ALIASES = {"1x1": "unstructured", "channelx1": "neurons", "mha": "heads"}
GROUP_STAGES = {"neurons": "prune_ffn", "heads": "prune_heads"}
# What a pruning scope is called by the stages that remove weights, and by those that remove neurons and heads.
WEIGHT_ALLOCATIONS = {"local": "uniform", "global": "owl"}
GROUP_ALLOCATIONS = {"local": "uniform", "global": "global"}
# Configs of other tools name them to be left alone, which they are.
NEVER_PRUNED = ("lm_head", "embed_tokens")
OF_TRAINING = ("start_step", "end_step", "pruning_frequency", "sparsity_decay_type")
# What the base class writes beside a config's own entries.
STAMPS = ("model_type", "transformers_version", "optimum_version")
MEASURED = ("measured_sparsity", "measured_sparsity_by_op")


class LLMKernelPruningConfig(RecipeConfig):
    """What to prune, and once it is done what was reached.

    Args:
        target_sparsity: share to remove, in (0, 1): of the weights, the neurons or the heads that it works on. An N:M
            pattern says it already.
        pruning_type: which of them stay. Weights: `"admm"` (default), `"sparsegpt"`, `"wanda"`, `"magnitude"`. Neurons
            and heads: `"wanda"` (default), `"flap"`, `"minitron"`, `"obs"`, `"magnitude"`.
        pattern: `"unstructured"` (or `"1x1"`); `"N:M"`, N weights *kept* of every M inputs; `"neurons"` (or
            `"channelx1"`), of the feed-forwards; `"heads"` (or `"mha"`), of the attentions.
        pruning_scope: `"local"` removes as much in every layer; `"global"` shares it out among them, by outliers for
            weights (OWL, arXiv 2310.05175), by one threshold for neurons and heads.
        op_names: names or globs of the linears whose weights are pruned (`q_proj`, `mlp.*`); by default all.
        excluded_op_names: those to leave out.
        layers: `[first, end]`, the layers it works on, `end` left out; by default all.
        update: what those that stay become, as the stages `sparsify`, `prune_ffn` and `prune_heads` know it.
        align: the number of neurons that stay is a multiple of it.
        dtype, calibration, evaluation: as in a `Recipe`; tables.
        recipe: a ready `Recipe` or its table, in place of all of these.
        measured_sparsity, measured_sparsity_by_op: of the result, see `measure_sparsity`; `prune` fills them in.

    Raises:
        ValueError: an unknown name or a setting outside its range, with the remedy.
    """

    CONFIG_NAME = "pruning_config.json"
    FULL_CONFIGURATION_FILE = "pruning_config.json"
    kind = "pruning config"
    measured = ("measured_sparsity", "measured_sparsity_by_op")
    target_sparsity: float | None = None
    pruning_type: str | None = None
    pattern: str = "unstructured"
    pruning_scope: str = "local"
    op_names: list[str] | None = None
    excluded_op_names: list[str] | None = None
    layers: list[int] | None = None
    update: str | None = None
    align: int | None = None
    dtype: str | None = None
    calibration: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    recipe: dict[str, Any] | Recipe | None = None
    measured_sparsity: float | None = None
    measured_sparsity_by_op: dict[str, float] | None = None

    def __post_init__(self, **unknown: Any):
        if names := sorted(set(unknown) & set(OF_TRAINING)):
            raise ValueError(
                f"pruning config: {names} are of pruning while training; give them to the Trainer callback "
                "hf_llmkernel.GradualPruning."
            )
        super().__post_init__(**unknown)

    def _stage_name(self) -> str:
        return GROUP_STAGES.get(self.pattern, "sparsify")

    def _stage_settings(self) -> dict[str, Any]:
        shared = {"method": self.pruning_type, "update": self.update, "layers": self.layers}
        if self.pattern in GROUP_STAGES:
            allocation = GROUP_ALLOCATIONS[self.pruning_scope]
            return given({**shared, "ratio": self.target_sparsity, "allocation": allocation, "align": self.align})
        own = {"sparsity": self.target_sparsity, "pattern": self.pattern}
        allocation = WEIGHT_ALLOCATIONS[self.pruning_scope]
        return given({**shared, **own, "allocation": allocation, **self._chosen_linears()})

    def _check(self) -> None:
        self.pattern = ALIASES.get(str(self.pattern), str(self.pattern))
        if self.recipe is None:
            self._check_pattern()
            self._check_names()

    def _check_pattern(self) -> None:
        groups, target = self.pattern in GROUP_STAGES, self.target_sparsity
        fixed = not groups and _is_n_m(self.pattern)
        number = isinstance(target, int | float) and not isinstance(target, bool) and 0 < target < 1
        if not number and not (fixed and target is None):
            raise ValueError(f"target_sparsity={target!r}: must be above 0 and below 1, the share to remove.")
        if self.pruning_scope not in list(WEIGHT_ALLOCATIONS):
            raise ValueError(f"pruning_scope={self.pruning_scope!r}: must be one of {list(WEIGHT_ALLOCATIONS)}.")
        if fixed and self.pruning_scope == "global":
            raise ValueError(f"pruning_scope='global': pattern={self.pattern!r} fixes every layer; make it 'local'.")
        methods = list(GROUP_METHODS if groups else WEIGHT_METHODS)
        if self.pruning_type is not None and self.pruning_type not in methods:
            raise ValueError(f"pruning_type={self.pruning_type!r}: pattern={self.pattern!r} knows {methods}.")
        if self.align is not None and self.pattern != "neurons":
            raise ValueError(f"align={self.align!r}: goes with pattern='neurons' alone; leave it out.")

    def _check_names(self) -> None:
        super()._check_names()
        for name in ("op_names", "excluded_op_names"):
            value = getattr(self, name)
            if value and self.pattern in GROUP_STAGES:
                raise ValueError(
                    f"{name}={value!r}: {self.pattern} are removed from all linears that they run through; leave it "
                    "out, or restrict by layers."
                )


def _is_n_m(pattern: Any) -> bool:
    """Whether a pattern of weights is N:M, not unstructured."""
    try:
        return kept_of_group(pattern) is not None
    except ValueError:
        raise ValueError(
            f"pattern={pattern!r}: must be 'unstructured', 'N:M' with N < M such as '2:4', 'neurons' or 'heads'; "
            "blocks such as '4x1' have no form that is stored smaller."
        ) from None


class LLMKernelPruner(CheckpointQuantizer):
    """Prunes a checkpoint of this family, or of one that `convert_checkpoint` knows, block by block.

    Args:
        model_or_path: a folder, Hub id or `.gguf` file, or a model in memory.
        tokenizer: for the texts of calibration and evaluation; by default the checkpoint's own.
    """

    def prune(
        self,
        save_dir: str | Path,
        pruning_config: LLMKernelPruningConfig | Recipe | dict[str, Any],
        progress: bool = True,
    ) -> LLMKernelPruningConfig:
        """Writes the pruned checkpoint, its recipe, and `pruning_config.json` with what was reached.

        Args:
            save_dir: a new or empty folder. Interrupted, the same call goes on where it was.
            pruning_config: a config, a ready recipe, or the table of either.
            progress: whether to show bars on stderr.

        Returns:
            The config with its measured sparsity, as it is saved; the one given stays as it was.

        Raises:
            ValueError: bad input, as `compress` says.
        """
        check_places(self.model_or_path, save_dir)
        config = LLMKernelPruningConfig.read(pruning_config)
        before = count_stored(self.model_or_path)
        recipe, measured = config.to_recipe(), partial(_save_measured, config, before, progress)
        compress(self.model_or_path, recipe, save_dir, self.tokenizer, progress, finish=measured)
        reached = LLMKernelPruningConfig.from_pretrained(save_dir)
        by_op = reached.measured_sparsity_by_op or {}
        reached.measured_sparsity_by_op = {leaf: by_op[leaf] for leaf in LINEARS if leaf in by_op}  # a file sorts them
        return reached

    def quantize(self, save_dir: str | Path, file_prefix: str | None = None, **kwargs: Any) -> Path:
        """Stores the linears as integers instead, which the base class asks for.

        Args:
            save_dir: a new or empty folder.
            file_prefix: must be `None`; the files have the names that `from_pretrained` knows.
            kwargs: settings of the `quantize` stage, such as `bits=8`.

        Returns:
            `save_dir`.

        Raises:
            ValueError: bad input, as `compress` says.
        """
        self.check_file_prefix(file_prefix)
        compress(self.model_or_path, {"stages": [{"quantize": kwargs}]}, save_dir, self.tokenizer)
        return Path(save_dir)


def _save_measured(config: LLMKernelPruningConfig, before: Counter[str], progress: bool, folder: Path) -> None:
    """Writes a config beside the checkpoint it made, with what was reached there."""
    total, by_op = measure_sparsity(before, inspect(folder, verify=True, progress=progress).entries)
    config.with_measured(measured_sparsity=total, measured_sparsity_by_op=by_op).save_pretrained(folder)


def count_stored(model_or_path: Any) -> Counter[str]:
    """Weights stored by kind of linear (`q_proj`, …) over all blocks, biases apart, from the configuration alone.

    Raises:
        ValueError: a checkpoint that is not there, or of a family that is not known.
    """
    fields = _config_fields(model_or_path)
    config = shape_config(fields)
    if config is None:
        raise ValueError(f"model_type={fields.get('model_type')!r}: cannot be pruned; take a Llama-shaped checkpoint.")
    counts: Counter[str] = Counter()
    for slot in slots(config, "", has_head=False):
        leaf = slot.name.rpartition(".")[2]
        if leaf in LINEARS:
            counts[leaf] += stored_values(slot.form, slot.out_features, slot.in_features)
    return counts


def _config_fields(model_or_path: Any) -> dict[str, Any]:
    if not isinstance(model_or_path, str | Path):
        return model_or_path.config.to_dict()
    found = locate_source(model_or_path)
    if found.gguf is not None:
        return gguf_config(GGUFFile(found.gguf))
    return read_config_fields(found.folder / "config.json")


def measure_sparsity(before: Counter[str], entries: Iterable[Entry]) -> tuple[float, dict[str, float]]:
    """The share of a model's weights that its pruned form no longer stores.

    Args:
        before: weights stored by kind of linear.
        entries: the inventory of the pruned checkpoint.

    Returns:
        Over all linears of the kinds that lost any, and of every kind by name, linears of all layers together.
    """
    after: Counter[str] = Counter()
    for entry in entries:
        biases = entry.dense_parameters - prod(entry.shape)
        after[entry.name.rpartition(".")[2]] += entry.parameters - biases
    by_op = {leaf: 1 - after[leaf] / count for leaf, count in before.items()}
    pruned = [leaf for leaf, sparsity in by_op.items() if sparsity > 0]
    total = sum(before[leaf] for leaf in pruned)
    return 1 - sum(after[leaf] for leaf in pruned) / max(total, 1) if pruned else 0.0, by_op
