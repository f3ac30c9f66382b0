"""`sparsify`: matrices that keep some of their weights, anywhere or N of every M columns.

A method chooses which weights stay; an update gives those that stay new values. They are chosen apart: any update works
after any mask. SparseGPT and ADMM find both together, which is what they do where no update is named.

Reading order: masks by method -> updates -> the stage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ..block import Block, matrix_form, matrix_names, matrix_shape, set_form
from ..inputs import InputStatistic
from ..registry import register
from ..stage import MatrixStage, matrix_inputs, refuse_form
from .admm import DAMPENING as ADMM_DAMPENING
from .admm import admm
from .allocation import outlier_share, owl_sparsities
from .least_squares import least_squares
from .magnitude import magnitude_scores
from .mask import SCOPES, check_sparsity, kept_per_row, select_mask
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
ALLOCATIONS = ("uniform", "owl")
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
        allocation: `"uniform"`, or `"owl"`: layers with more outliers lose fewer.
        span: of `"owl"`, how far a layer's sparsity lies from the mean at most.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    method: str = "admm"
    update: str | None = None
    scope: str | None = None
    allocation: str = "uniform"
    span: float = 0.08

    def __post_init__(self):
        super().__post_init__()
        check_sparsity(self.sparsity, self.pattern)
        choices = {"method": METHODS, "update": (None, *UPDATES), "scope": (None, *SCOPES), "allocation": ALLOCATIONS}
        for name, legal in choices.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {list(legal)}.")
        if self.allocation == "owl":
            if self.pattern != "unstructured":
                raise ValueError(f"allocation='owl': pattern={self.pattern!r} fixes every layer; leave out either.")
            owl_sparsities([0.0, 1.0], self.share, self.span)

    @property
    def share(self) -> float:
        """Of the weights to remove."""
        return check_sparsity(self.sparsity, self.pattern)

    @property
    def needs_data(self) -> bool:
        return self._needs is not None or self.is_global

    @property
    def is_global(self) -> bool:
        return self.allocation == "owl"

    @property
    def _needs(self) -> str | None:
        return "gram" if self.update not in (None, "none") else METHODS[self.method].needs

    @property
    def statistic(self) -> str:
        return self._needs or "moments"

    @property
    def solve_products(self) -> float:
        return {None: 0.1, "moments": 0.1, "gram": 18.0}[self._needs]

    def decide(self, survey: "Survey") -> dict[str, Any]:
        """A sparsity a layer, from the outliers among its Wanda scores."""
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
        sparsities = owl_sparsities([found[index]["outliers"] for index in layers], self.share, self.span, sizes)
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
        sparsity = self.share if target is None else target
        set_form(layer, name, self.form(*matrix_shape(layer, name), sparsity))
        return {"sparsity": sparsity}

    def change(self, block: Block, name: str, inputs: InputStatistic | None, target: float | None) -> None:
        sparsity = self.share if target is None else target
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
