"""What every stage of a recipe is: its settings, the shapes it decides, and what it does to one block.

A stage is a frozen dataclass of settings, registered under its recipe name:

    plan            shapes and forms of one layer after it, or why it cannot be, from the configuration alone
    needs           what it wants to know about the inputs of a layer's linears; nothing, if it needs no calibration
    apply           the work at one site of a block, which the walk (`walk.py`) stops at in order
    plan_top, apply_top     the same for the embedding and the head
    is_global, decide       a decision over all layers at once, made before any block is changed: each layer's *target*

A stage that changes matrices one at a time, whatever else is in the block, is a `MatrixStage` and says `change` instead
of `apply`.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from ..convert.families import describe_stored
from ..model.configuration_llm_kernel import LLMKernelConfig
from .block import SITES, Block, matrix_form, matrix_names, module_path, present_linears
from .inputs import InputStatistic

if TYPE_CHECKING:
    from .survey import Survey


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage.

    Args:
        include: names or globs of the linears it works on (`q_proj`, `*_proj`, `mlp.*`, `q_proj.a`); by default all.
        exclude: those to leave out.
        layers: `[first, end]`, the layers it works on, `end` left out as in Python; by default all.
        embeddings: whether it works on the token embedding and the head too.
    """

    name: ClassVar[str] = ""
    # A structural stage removes inputs and outputs of several linears: those of other stages wait until it is done.
    structural: ClassVar[bool] = False
    takes_embeddings: ClassVar[bool] = False
    # A stage that changes what runs between the blocks: the next stage finds another model, in a sweep of its own.
    alone: ClassVar[bool] = False
    # A stage that works when the result is written, not in the blocks.
    writes_whole: ClassVar[bool] = False

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    layers: tuple[int, int] | None = None
    embeddings: bool = False

    def __post_init__(self):
        self._check_layers()
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"{name}={patterns!r}: must be a list of names or globs, such as [q_proj, '*_proj'].")
            object.__setattr__(self, name, tuple(patterns))
        if not isinstance(self.embeddings, bool):
            raise ValueError(f"embeddings={self.embeddings!r}: must be true or false.")
        if self.embeddings and not self.takes_embeddings:
            raise ValueError("embeddings=true: this stage works on the blocks alone; leave it out.")

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        numbers = isinstance(self.layers, list | tuple) and all(type(number) is int for number in self.layers)
        if not numbers or len(self.layers) != 2 or not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"layers={self.layers!r}: must be [first, end] with 0 <= first < end; null takes all.")
        object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def needs_data(self) -> bool:
        """Whether calibration text has to run through the blocks."""
        return False

    @property
    def sweeps_data(self) -> bool:
        """Whether it runs while the blocks are changed too, not only for a decision."""
        return self.needs_data

    @property
    def needs_reference(self) -> bool:
        """Whether its statistics name targets: the uncompressed model then runs beside the compressed blocks."""
        return False

    @property
    def solve_products(self) -> float:
        """What a matrix `[O, I]` costs to solve for, in products of O x I x I; for estimates of time."""
        return 0.5

    def search_work(self, config: LLMKernelConfig) -> tuple[int, int]:
        """Products that its decision takes beside a walk over the calibration text, and bytes; for estimates."""
        return 0, 0

    @property
    def is_global(self) -> bool:
        """Whether `decide` must look at all layers before one is changed."""
        return False

    def covers(self, index: int) -> bool:
        """Whether it works on layer `index`."""
        return self.layers is None or self.layers[0] <= index < self.layers[1]

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Those of some linears or matrices that `include` and `exclude` leave."""
        return [name for name in names if _matches(name, self.include) and not _matches(name, self.exclude)]

    def check_choice(self, config: LLMKernelConfig) -> None:
        """Raises `ValueError` where it names layers, or linears, that a model does not have."""
        layers = [cast(LLMKernelConfig, layer) for layer in config.per_layer_config]
        if self.layers is not None and self.layers[1] > len(layers):
            named = list(self.layers)
            raise ValueError(f"{self.name}: layers={named} is beyond the {len(layers)} layers of the model.")
        names = {name: None for layer in layers for name in (*present_linears(layer), *matrix_names(layer))}
        for pattern in (*self.include, *self.exclude):
            if not any(_matches(name, (pattern,)) for name in names):
                raise ValueError(f"{self.name}: {pattern!r} matches no linear; those of this model are {list(names)}.")
        if not self.chosen(names) and not self.embeddings:
            alone = ", or set embeddings: true for the embedding and the head alone" if self.takes_embeddings else ""
            raise ValueError(
                f"{self.name}: include and exclude leave none of {list(names)}; leave the stage out{alone}."
            )

    def check_result(self, result: list[dict[str, Any]]) -> None:
        """Raises `ValueError` where what it plans for all layers is nothing."""

    def decide(self, survey: "Survey") -> dict[str, Any]:
        """What a global stage decides, of types of JSON: `{"targets": one a layer, …}`, or tensors: `Survey.keep`."""
        raise TypeError(f"{type(self).__name__} decides nothing")

    def depth(self, decision: dict[str, Any] | None, count: int) -> list[int]:
        """Which of `count` layers stay; by default all."""
        return list(range(count))

    def assume(self, layers: list[LLMKernelConfig]) -> list[Any]:
        """What a plan takes for the targets of all layers before anything is decided; by default none."""
        return [None] * len(layers)

    def plan(self, layer: LLMKernelConfig, target: Any = None) -> dict[str, Any]:
        """Gives a layer's own configuration its new shapes and forms; returns what is worth reporting of them.

        `target` is the layer's part of the decision; without it a global stage plans as if all layers were alike.
        """
        raise TypeError(f"{type(self).__name__} does not say what shapes it makes")

    def chosen_stages(self, target: Any) -> "tuple[Stage, ...] | None":
        """The stages that do its work in a layer, where its decision is a choice of other stages; else `None`."""
        return None

    def needs(self, layer: LLMKernelConfig) -> dict[str, str]:
        """`{site: what is to be known of its inputs}`, see `InputStatistic`."""
        return {}

    def begin(self, block: Block, target: Any = None) -> None:
        """What is done to a block before anything runs through it."""

    def apply(self, block: Block, site: str, inputs: InputStatistic | None, target: Any = None) -> torch.Tensor | None:
        """Does the work at a site; returns what it did to the site's inputs, see `changed_inputs`."""
        raise TypeError(f"{type(self).__name__} does not say what it does to a block")

    def plan_top(self, config: LLMKernelConfig) -> None:
        """Gives the embedding and the head their new forms; by default they stay."""

    def plan_whole(self, config: LLMKernelConfig) -> None:
        """Gives the whole model's configuration what is neither shape nor form, once all layers have theirs."""

    def apply_top(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """The stored tensors `{suffix: tensor}` of an embedding or head `[V, H]`; `None` where it stays as it is."""
        return None

    def change_top(
        self, tensors: dict[str, torch.Tensor], config: LLMKernelConfig, target: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """All tensors outside of the blocks by their full names, after a decision for the whole model.

        `config` is the model's before it, `target` the tensors that the decision named, see `Survey.keep`.
        """
        raise TypeError(f"{type(self).__name__} decides nothing for the whole model")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The recipe's entry, every setting written out."""
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {self.name: settings}


@dataclass(frozen=True, kw_only=True)
class MatrixStage(Stage):
    """A stage that changes matrices one at a time: those of a site after their inputs were seen."""

    def needs(self, layer: LLMKernelConfig) -> dict[str, str]:
        if not self.needs_data:
            return {}
        return {site: self.statistic for site in SITES if self.chosen(matrix_names(layer, site))}

    @property
    def statistic(self) -> str:
        """What it wants to know of inputs, see `InputStatistic`."""
        return "moments"

    def plan(self, layer: LLMKernelConfig, target: Any = None) -> dict[str, Any]:
        names = self.chosen(matrix_names(layer))
        facts = {name: self.plan_matrix(layer, name, target) for name in names}
        return {"matrices": names, **_summary(facts)}

    def apply(self, block: Block, site: str, inputs: InputStatistic | None, target: Any = None) -> torch.Tensor | None:
        for name in self.chosen(block.matrices(site)):
            self.change(block, name, None if inputs is None else matrix_inputs(block, name, inputs), target)

    def check_result(self, result: list[dict[str, Any]]) -> None:
        if not self.embeddings and all(variant.get("matrices") == [] for variant in result):
            raise ValueError(f"{self.name}: finds no matrix to work on in the layers it takes; leave the stage out.")

    def plan_matrix(self, layer: LLMKernelConfig, name: str, target: Any) -> dict[str, Any]:
        """Gives one matrix of a layer's configuration its new form; returns what is worth reporting."""
        raise TypeError(f"{type(self).__name__} does not say what form it makes")

    def change(self, block: Block, name: str, inputs: InputStatistic | None, target: Any) -> None:
        """Does the work on one matrix."""
        raise TypeError(f"{type(self).__name__} does not say what it does to a matrix")


def matrix_inputs(block: Block, name: str, inputs: InputStatistic) -> InputStatistic:
    """The inputs of a matrix at a site: of a low rank's second factor, what the first puts out."""
    leaf, _, factor = name.partition(".")
    return inputs.through(block.weight(f"{leaf}.a").to(inputs.sums.device)) if factor == "b" else inputs


class UnfitForm(ValueError):
    """A matrix is stored in a form that a stage cannot work on; its path is that in the layer."""

    def __init__(self, stage: str, path: str, reason: str):
        super().__init__(f"{stage}: {path} {reason}")
        self.parts = (stage, path, reason)

    def in_layer(self, index: int) -> ValueError:
        """The same with the layer's number."""
        stage, path, reason = self.parts
        return ValueError(f"{stage}: layers.{index}.{path} {reason}")


def refuse_form(stage: str, layer: LLMKernelConfig, name: str, remedy: str) -> None:
    """Raises `UnfitForm` for a matrix of a layer."""
    form = describe_stored(matrix_form(layer, name))
    raise UnfitForm(stage, module_path(name), f"is stored as {form}; {remedy}")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits a matrix: its own name, its linear's, or either with the sublayer before it."""
    leaf = name.partition(".")[0]
    names = {name, leaf, module_path(name), module_path(leaf)}
    return any(fnmatchcase(known, pattern) for known in names for pattern in patterns)


def _summary(facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Facts that all matrices share as one, the others a matrix."""
    shared = dict(next(iter(facts.values()), {}))
    for fact in facts.values():
        shared = {key: value for key, value in shared.items() if fact.get(key, ...) == value}
    own = {name: {k: v for k, v in fact.items() if k not in shared} for name, fact in facts.items()}
    return {**shared, **({"each": own} if any(own.values()) else {})}
