"""`sparsify`: matrices that keep some of their weights, anywhere or N of every M columns.

A method chooses which weights stay; an update gives those that stay new values. They are chosen apart: any update works
after any mask. SparseGPT and ADMM find both together, which is what they do where no update is named.

Reading order: masks by method -> updates -> the stage.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from ...model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ..block import Block, matrix_form, matrix_names, matrix_shape, set_form
from ..inputs import InputStatistic
from ..plan import layer_sizes, own_layers
from ..registry import register
from ..search.stage import Search
from ..stage import MatrixStage, matrix_inputs, refuse_form
from .admm import DAMPENING as ADMM_DAMPENING
from .admm import admm
from .allocation import outlier_share, owl_sparsities
from .least_squares import least_squares
from .magnitude import magnitude_scores
from .mask import SCOPES, check_sparsity, kept_of_group, kept_per_row, select_mask
from .reconstruction import Reconstruction, reconstruction_loss
from .sparsegpt import DAMPENING as SPARSEGPT_DAMPENING
from .sparsegpt import sparsegpt
from .wanda import wanda_scores

if TYPE_CHECKING:
    from ..survey import Survey


class Task(NamedTuple):
    """A weight `[O, I]` to make sparse, what is known of its inputs, and how."""

    weight: torch.Tensor
    inputs: InputStatistic
    sparsity: float
    pattern: str
    scope: str


class Method(NamedTuple):
    """What a method needs to know of the inputs (`None`: nothing), where weights compete, and what it makes."""

    needs: str | None
    scope: str
    sparsify: Callable[[Task], Reconstruction]


def _masked(task: Task, scores: torch.Tensor) -> Reconstruction:
    mask = select_mask(scores, task.sparsity, task.pattern, task.scope)
    return Reconstruction(task.weight * mask, mask, 0.0)


METHODS = {
    "magnitude": Method(None, "row", lambda t: _masked(t, magnitude_scores(t.weight))),
    "wanda": Method("moments", "row", lambda t: _masked(t, wanda_scores(t.weight, t.inputs.norm))),
    "sparsegpt": Method("gram", "layer", lambda t: sparsegpt(t.weight, t.inputs.gram, t.sparsity, t.pattern)),
    "admm": Method(
        "gram",
        "layer",
        lambda t: admm(t.weight, t.inputs.gram, sparsity=t.sparsity, pattern=t.pattern, scope=t.scope),
    ),
}


def _least_squares(task: Task, mask: torch.Tensor) -> Reconstruction:
    return Reconstruction(least_squares(task.weight, task.inputs.gram, mask), mask, 0.0)


UPDATES: dict[str, Callable[[Task, torch.Tensor], Reconstruction]] = {
    "none": lambda t, mask: Reconstruction(t.weight * mask, mask, 0.0),
    "sparsegpt": lambda t, mask: sparsegpt(t.weight, t.inputs.gram, mask=mask),
    "admm": lambda t, mask: admm(t.weight, t.inputs.gram, mask=mask),
    "least_squares": _least_squares,
}
ALLOCATIONS = ("uniform", "owl", "searched")
REACHES = {"uniform": 0.0, "owl": 0.08, "searched": 0.3}
ASKED_DAMPENING = {"sparsegpt": SPARSEGPT_DAMPENING, "admm": ADMM_DAMPENING}


@register("sparsify")
@dataclass(frozen=True, kw_only=True)
class Sparsify(MatrixStage):
    """Stores matrices sparse.

    Args:
        sparsity: share of the weights to remove; left out where the pattern says it.
        pattern: `"unstructured"` or `"N:M"`.
        method: `"admm"`, `"sparsegpt"`, `"wanda"` or `"magnitude"`: which weights stay.
        update: `"none"`, `"sparsegpt"`, `"admm"` or `"least_squares"`: what those that stay become; by default what
            the method itself does.
        scope: where unstructured weights compete, in each `"row"` or the whole `"layer"`; by default as the method's
            paper.
        allocation: `"uniform"`; `"owl"`: layers with more outliers lose fewer; or `"searched"`: of seven sparsities in
            each layer the mix that loses least at the bytes of the uniform one, see `Search`.
        span: how far a layer's sparsity lies from the mean at most; by default 0.08, searched 0.3 or what is possible.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    method: str = "admm"
    update: str | None = None
    scope: str | None = None
    allocation: str = "uniform"
    span: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_sparsity(self.sparsity, self.pattern)
        choices = {"method": METHODS, "update": (None, *UPDATES), "scope": (None, *SCOPES), "allocation": ALLOCATIONS}
        for name, legal in choices.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {list(legal)}.")
        if self.allocation == "uniform":
            if self.span is not None:
                raise ValueError(f"span={self.span!r}: allocation='uniform' knows none; leave it out.")
        elif self.pattern != "unstructured":
            raise ValueError(
                f"allocation={self.allocation!r}: pattern={self.pattern!r} fixes every layer; leave out either."
            )
        elif self.span is not None and not 0 < self.span < min(self.share, 1 - self.share):
            raise ValueError(
                f"span={self.span!r}: sparsities of {self.share} ± span must stay above 0 and below 1; lower it."
            )

    @property
    def share(self) -> float:
        """Of the weights to remove."""
        return check_sparsity(self.sparsity, self.pattern)

    @property
    def reach(self) -> float:
        """How far a layer's sparsity may lie from the mean."""
        possible = 0.9 * min(self.share, 1 - self.share)
        return min(REACHES[self.allocation], possible) if self.span is None else self.span

    @property
    def _shares(self) -> list[float]:
        """What a search chooses from."""
        return [round(self.share + self.reach * step / 3, 6) for step in range(-3, 4)]

    def _sparsity(self, target: float | int | None) -> float:
        """A layer's, of its target: what OWL decided, or which of `_shares` a search did."""
        if target is None:
            return self.share
        return self._shares[int(target)] if self.allocation == "searched" else target

    @property
    def needs_data(self) -> bool:
        return self._needs is not None or self.is_global

    @property
    def is_global(self) -> bool:
        return self.allocation != "uniform"

    @property
    def _needs(self) -> str | None:
        return "gram" if self.update not in (None, "none") else METHODS[self.method].needs

    @property
    def statistic(self) -> str:
        return self._needs or "moments"

    @property
    def solve_products(self) -> float:
        return {None: 0.1, "moments": 0.1, "gram": 18.0}[self._needs]

    def search_work(self, config: LLMKernelConfig) -> tuple[int, int]:
        return self._search(config).search_work(config) if self.allocation == "searched" else (0, 0)

    def check_choice(self, config: LLMKernelConfig) -> None:
        """Also refuses what would store a matrix larger than it is, or groups wider than a matrix."""
        super().check_choice(config)
        dtype, least = cast(torch.dtype, config.dtype), self.share - self.reach
        for index, layer in enumerate(own_layers(config)):
            for name in self.chosen(matrix_names(layer)) if self.covers(index) else ():
                self._check_saving(layer, name, least, dtype)

    def _check_saving(self, layer: LLMKernelConfig, name: str, sparsity: float, dtype: torch.dtype) -> None:
        rows, columns = matrix_shape(layer, name)
        group = kept_of_group(self.pattern)
        if group is not None and group[1] > columns:
            raise ValueError(
                f"sparsify: pattern={self.pattern!r}: {name} has {columns} columns, fewer than a group; take smaller "
                "groups, or exclude it."
            )
        stored = self.form(rows, columns, sparsity).stored_tensors(rows, columns).values()
        sparse = sum(math.prod(shape) * (getattr(torch, own) if own else dtype).itemsize for shape, own in stored)
        dense = rows * columns * dtype.itemsize
        if sparse >= dense:
            asked = f"pattern={self.pattern!r}" if group else f"sparsity={sparsity:.4g}"
            raise ValueError(
                f"sparsify: {asked}: {name} would take {sparse} bytes, dense it takes {dense}: a mask costs one bit a "
                f"weight; remove more than {1 / (8 * dtype.itemsize):.4g}, or leave the stage out."
            )

    def decide(self, survey: "Survey") -> dict[str, Any]:
        """A sparsity a layer."""
        return self._decide_searched(survey) if self.allocation == "searched" else self._decide_owl(survey)

    def _decide_searched(self, survey: "Survey") -> dict[str, Any]:
        """The mix that loses least at the bytes that one sparsity takes, with the table and front it was found by."""
        return self._search(survey.config, survey.dtype).decide(survey)

    def _search(self, config: LLMKernelConfig, dtype: torch.dtype | None = None) -> Search:
        """The search among sparsities in even steps around the mean."""
        uniform = replace(self, allocation="uniform", span=None, layers=None)
        layers = [layer for index, layer in enumerate(own_layers(config)) if self.covers(index)]
        for layer in layers:
            uniform.plan(layer)
        budget = sum(layer_sizes(layer, dtype or cast(torch.dtype, config.dtype))[1] for layer in layers)
        choices = tuple((replace(uniform, sparsity=share),) for share in self._shares)
        return Search(choices=choices, bytes=budget, layers=self.layers)

    def _decide_owl(self, survey: "Survey") -> dict[str, Any]:
        """From the outliers among its Wanda scores."""
        seen: dict[str, torch.Tensor] = {}

        def look(block: Block, site: str, inputs: InputStatistic) -> dict[str, Any]:
            for name in self.chosen(block.matrices(site)):
                seen[name] = wanda_scores(block.weight(name), matrix_inputs(block, name, inputs).norm)
            if len(seen) < len(self.chosen(block.matrices())):
                return {}
            share = outlier_share(*seen.values())
            seen.clear()
            return {"outliers": share}

        def needs(layer: LLMKernelConfig) -> dict[str, str]:
            return dict.fromkeys(self.needs(layer), "moments")

        found = survey.observe(needs, look)
        layers = [index for index, entry in enumerate(found) if entry and self.covers(index)]
        sizes = [sum(self._sizes(survey.layers[index])) for index in layers]
        sparsities = owl_sparsities([found[index]["outliers"] for index in layers], self.share, self.reach, sizes)
        targets: list[float | None] = [None] * len(found)
        for index, sparsity in zip(layers, sparsities, strict=True):
            targets[index] = sparsity
        return {"targets": targets, "outliers": [entry.get("outliers") for entry in found]}

    def _sizes(self, layer: LLMKernelConfig) -> list[int]:
        shapes = [matrix_shape(layer, name) for name in self.chosen(matrix_names(layer))]
        return [rows * columns for rows, columns in shapes]

    def form(self, rows: int, columns: int, sparsity: float) -> LinearForm:
        """What a dense matrix `[rows, columns]` becomes."""
        if self.pattern != "unstructured":
            return LinearForm(sparsity=self.pattern)
        return LinearForm(sparsity="bitmask", nnz=rows * kept_per_row(columns, sparsity))

    def plan_matrix(self, layer: LLMKernelConfig, name: str, target: float | None) -> dict[str, Any]:
        if not matrix_form(layer, name).is_dense:
            refuse_form("sparsify", layer, name, "only dense matrices can be: exclude it, or sparsify first.")
        sparsity = self._sparsity(target)
        set_form(layer, name, self.form(*matrix_shape(layer, name), sparsity))
        return {"sparsity": sparsity}

    def change(self, block: Block, name: str, inputs: InputStatistic | None, target: float | None) -> None:
        sparsity = self._sparsity(target)
        weight = block.weight(name)
        method = METHODS[self.method]
        task = Task(weight, inputs or InputStatistic(), sparsity, self.pattern, self.scope or method.scope)
        made = method.sparsify(task)
        if self.update is not None:
            made = UPDATES[self.update](task, made.mask)
        self._note(block, name, weight, made, inputs)
        rows, columns = weight.shape
        block.store(name, made.weight, self.form(rows, columns, sparsity), mask=made.mask)

    def _note(
        self, block: Block, name: str, weight: torch.Tensor, made: Reconstruction, inputs: InputStatistic | None
    ) -> None:
        if inputs is not None and self._needs == "gram":
            loss = reconstruction_loss(weight, made.weight, inputs.gram)
            asked = ASKED_DAMPENING.get(self.update or self.method, 0.0)
            raised = {"dampening": made.dampening} if made.dampening > asked else {}
            block.note(stage=self.name, matrix=name, loss=loss, **raised)
