"""`quantize`: matrices as integers in groups that share a scale.

A method chooses the grid of every group and the integers on it. `rtn` and `hqq` need no data; `gptq` and
`coordinate_descent` look at what enters a matrix. Before any of them, a fold may scale columns so that they round
finer. A sparse matrix keeps its mask, a low-rank linear becomes one of integer factors.

Reading order: methods -> settings and their checks -> the plan -> the work on a matrix, and on the embedding and head.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ...model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ...model.linear_llm_kernel import pack_weight
from ..block import SITES, Block, matrix_form, matrix_names, matrix_shape, set_form
from ..inputs import InputStatistic
from ..registry import register
from ..solve import damped_inverse_cholesky
from ..sparsify.reconstruction import reconstruction_loss
from ..sparsify.sparsegpt import without_dead_inputs
from ..stage import MatrixStage, refuse_form
from .coordinate_descent import coordinate_descent
from .fold import Factors, awq_factors, can_fold, fold, shared_by_heads, smooth_factors, takers
from .gptq import DAMPENING, Rounded, gptq
from .grid import grid_of, underflowed
from .hqq import hqq

logger = logging.getLogger(__name__)


class Task(NamedTuple):
    """A weight `[O, I]` to round, the form it gets, which of it stays, the stage, and XᵀX where the method needs it."""

    weight: torch.Tensor
    form: LinearForm
    mask: torch.Tensor | None
    stage: "Quantize"
    gram: torch.Tensor = torch.empty(0)


class Method(NamedTuple):
    """Whether a method looks at the inputs, which settings it has, what it costs to solve, and what it makes."""

    needs_data: bool
    settings: tuple[str, ...]
    solve_products: float
    round: Callable[[Task], Rounded]


def _round_to_nearest(task: Task) -> Rounded:
    weight, form, mask, stage, _ = task
    importance = None
    if (
        stage.scale_search or METHODS[stage.method].needs_data
    ):  # of an embedding no inputs are known: every error counts alike
        importance = torch.ones_like(weight) if mask is None else mask.float()
    grid = grid_of(weight, form, importance)
    rounded = grid.nearest(weight)
    return Rounded(rounded if mask is None else rounded * mask, grid, 0.0)


def _gptq(task: Task) -> Rounded:
    weight, form, mask, stage, gram = task
    return gptq(
        weight,
        gram,
        form,
        mask,
        act_order=stage.act_order is not False,
        static_groups=stage.static_groups,
        scale_search=stage.scale_search is not False,
        dampening=stage.dampening,
    )


METHODS = {
    "rtn": Method(False, ("scale_search",), 0.5, _round_to_nearest),
    "hqq": Method(False, (), 2.0, lambda t: hqq(t.weight, t.form, t.mask)),
    "gptq": Method(True, ("scale_search", "act_order", "static_groups", "dampening"), 24.0, _gptq),
    "coordinate_descent": Method(
        True, ("dampening",), 80.0, lambda t: coordinate_descent(t.weight, t.gram, t.form, t.mask, t.stage.dampening)
    ),
}
FOLDS = (None, "awq", "smoothquant")
FOLD_ROWS = 128  # of all that take an input, on which methods with data search for its factor
FLAGS = {
    "symmetric": (True, False),
    "scale_search": (None, True, False),
    "act_order": (None, True, False),
    "static_groups": (True, False),
}


def remedy_for(method: Any) -> str:
    """The end of a message about a name that is no method but a fold, which goes beside one."""
    is_fold = isinstance(method, str) and method in FOLDS
    return f"; {method!r} is a fold, which goes beside one: fold: {method} (--set fold={method})" if is_fold else ""


@register("quantize")
@dataclass(frozen=True, kw_only=True)
class Quantize(MatrixStage):
    """Stores matrices as integers.

    The embedding and the head, where `embeddings` takes them in, are rounded to nearest, by `"hqq"` as it rounds.

    Args:
        bits: 8 or 4.
        group_size: columns that share a scale; `None` is one scale a row. One that does not divide the columns leaves
            a short last group, which is reported.
        symmetric: a grid around zero; else zero points are stored too.
        scale_dtype: `"float16"`, `"bfloat16"` or `"float32"`.
        zero_point_dtype: `"uint8"`, or one of those.
        method: `"rtn"`, round to nearest; `"hqq"`, on zero points of least l_p error; `"gptq"`, column by column, each
            making up for those before it; `"coordinate_descent"`, from there on to integers and grids of least error.
        scale_search: of `"rtn"` and `"gptq"`: scales of least error instead of the whole range's. By default `"gptq"`
            searches and `"rtn"` does not.
        act_order: of `"gptq"`, its default: columns in the order of their inputs' energy, which takes static groups.
        static_groups: of `"gptq"`: scales of the weights before any was rounded.
        dampening: of the Gram matrix, relative to the mean of its diagonal.
        fold: before columns are rounded, by whatever method, `"awq"` scales them by their inputs' magnitudes, and
            `"smoothquant"` to make the inputs fit for int8; norms, up_proj and v_proj, whatever they are stored as, are
            divided by as much.
    """

    bits: int
    group_size: int | None = 64
    symmetric: bool = True
    scale_dtype: str = "float16"
    zero_point_dtype: str = "uint8"
    method: str = "rtn"
    scale_search: bool | None = None
    act_order: bool | None = None
    static_groups: bool = False
    dampening: float = DAMPENING
    fold: str | None = None

    takes_embeddings = True

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in (8, 4):
            raise ValueError(f"bits={self.bits!r}: must be 8 or 4.")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise ValueError(
                f"group_size={self.group_size!r}: must be an integer of at least 1, or null for one scale a row."
            )
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: must be one of {list(METHODS)}{remedy_for(self.method)}.")
        if self.fold not in FOLDS:
            raise ValueError(f"fold={self.fold!r}: must be one of {list(FOLDS)}.")
        for name, legal in FLAGS.items():
            if not any(getattr(self, name) is flag for flag in legal):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be true or false.")
        number = isinstance(self.dampening, int | float) and not isinstance(self.dampening, bool)
        if not number or not 0 <= self.dampening < math.inf:
            raise ValueError(f"dampening={self.dampening!r}: must be a number of at least 0; 0.01 is the default.")
        self._check_zero_points()
        self._check_settings()
        _ = self.form  # whose own rules hold for the rest

    def _check_zero_points(self) -> None:
        if self.symmetric and self.zero_point_dtype != "uint8":
            raise ValueError(f"zero_point_dtype={self.zero_point_dtype!r}: has no use; set symmetric to false too.")
        if self.method == "hqq" and (self.symmetric or self.zero_point_dtype == "uint8"):
            raise ValueError(
                f"method='hqq': moves floating zero points, with symmetric={self.symmetric} and zero_point_dtype="
                f"{self.zero_point_dtype!r} there are none; set symmetric to false and zero_point_dtype to 'float16'."
            )

    def _check_settings(self) -> None:
        own = METHODS[self.method].settings
        for name in ("scale_search", "act_order", "static_groups", "dampening"):
            if name not in own and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                takers = [method for method, entry in METHODS.items() if name in entry.settings]
                raise ValueError(f"{name}={getattr(self, name)!r}: method={self.method!r} has no such; {takers} do.")

    @property
    def form(self) -> LinearForm:
        """What a dense matrix becomes."""
        return self._integer(LinearForm())

    def _integer(self, form: LinearForm) -> LinearForm:
        return replace(
            form,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=self.scale_dtype,
            zero_point_dtype=self.zero_point_dtype,
        )

    @property
    def needs_data(self) -> bool:
        return METHODS[self.method].needs_data or self.fold is not None

    @property
    def statistic(self) -> str:
        return "gram"

    @property
    def solve_products(self) -> float:
        return METHODS[self.method].solve_products + (0 if self.fold is None else 20)

    def plan(self, layer: LLMKernelConfig, target: Any = None) -> dict[str, Any]:
        facts = self._plan_fold(layer) if self.fold else {}
        return {**super().plan(layer, target), **facts}

    def _plan_fold(self, layer: LLMKernelConfig) -> dict[str, Any]:
        """What is not folded. Raises `ValueError` where a matrix takes inputs that are, and is integer already."""
        sites = [site for site in SITES if self.chosen(matrix_names(layer, site))]
        for name in [name for site in sites for name in takers(layer, site) if can_fold(layer, site)]:
            if matrix_form(layer, name).bits < 16:
                refuse_form("quantize", layer, name, f"fold={self.fold!r} scales its columns: leave fold out.")
        left = [name for site in sites for name in takers(layer, site) if not can_fold(layer, site)]
        return {"not_folded": left} if left else {}

    def plan_matrix(self, layer: LLMKernelConfig, name: str, target: Any) -> dict[str, Any]:
        form = matrix_form(layer, name)
        if form.bits < 16:
            refuse_form("quantize", layer, name, "quantized already: exclude it, or start from a float checkpoint.")
        set_form(layer, name, self._integer(form))
        rest = matrix_shape(layer, name)[1] % (self.group_size or 1)
        return {"last_group_size": rest} if rest else {}

    def apply(self, block: Block, site: str, inputs: InputStatistic | None, target: Any = None) -> torch.Tensor | None:
        found = None
        if self.fold and inputs is not None and can_fold(block.layer, site):
            found = self._factors(block, site, inputs)
        if found is None or inputs is None:
            super().apply(block, site, inputs, target)
            return None
        lost = {"awq": "loss", "smoothquant": "activation_loss"}[str(self.fold)]
        block.note(stage=self.name, site=site, exponent=found.exponent, **{lost: found.loss})
        fold(block, site, found.factors)
        super().apply(block, site, inputs.scaled(1 / found.factors), target)
        return 1 / found.factors

    def _factors(self, block: Block, site: str, inputs: InputStatistic) -> Factors | None:
        """The factors of a site's inputs, from the matrices to be rounded; `None` where there are none."""
        names = self.chosen(takers(block.layer, site))
        if not names:
            return None
        weight = torch.cat([block.weight(name) for name in names])
        if self.fold == "smoothquant":
            return smooth_factors(weight, shared_by_heads(block.layer, site, inputs.largest, torch.amax))
        return self._awq_factors(weight, shared_by_heads(block.layer, site, inputs.mean_magnitude, torch.mean), inputs)

    def _awq_factors(self, weight: torch.Tensor, magnitude: torch.Tensor, inputs: InputStatistic) -> Factors:
        """By what errors cost that are left to stand, or that later columns make up for, as the method is."""
        gram = inputs.gram
        if not METHODS[self.method].needs_data:
            importance = torch.ones_like(magnitude) if self.scale_search else None
            return awq_factors(weight, magnitude, self.form, lambda e: (e @ gram * e).sum(), importance)
        upper, _ = damped_inverse_cholesky(without_dead_inputs(weight, gram)[1], self.dampening)
        costs = upper.diagonal().float().square().reciprocal()
        rows = weight[:: max(len(weight) // FOLD_ROWS, 1)]
        return awq_factors(rows, magnitude, self.form, lambda e: (e.square() * costs).sum(), costs)

    def change(self, block: Block, name: str, inputs: InputStatistic | None, target: Any) -> None:
        weight, mask, form = block.weight(name), block.mask(name), self._integer(block.form(name))
        task = Task(weight, form, mask, self)
        if inputs is not None and METHODS[self.method].needs_data:
            task = task._replace(gram=inputs.gram)
        try:
            made = METHODS[self.method].round(task)
        except ValueError as error:
            raise ValueError(f"{block.path(name)}: {error}") from None
        if METHODS[self.method].needs_data:
            raised = {"dampening": made.dampening} if made.dampening > self.dampening else {}
            loss = reconstruction_loss(weight, made.weight, task.gram)
            block.note(stage=self.name, matrix=name, loss=loss, **raised)
        if lost := underflowed(weight, made.weight, made.grid):
            block.note(stage=self.name, matrix=name, underflowed=lost, scale_dtype=self.scale_dtype)
        _, scales, zero_points = made.grid
        block.store(name, made.weight, form, mask=mask, scales=scales, zero_points=zero_points)

    def plan_top(self, config: LLMKernelConfig) -> None:
        if not self.embeddings:
            return
        for name in ("embed_tokens_form",) if config.tie_word_embeddings else ("embed_tokens_form", "lm_head_form"):
            if not LinearForm.from_dict(getattr(config, name)).is_dense:
                raise ValueError(f"quantize: {name} is not dense; leave embeddings out, or use a dense checkpoint.")
            setattr(config, name, self.form.to_dict())

    def apply_top(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor] | None:
        method = METHODS["rtn" if METHODS[self.method].needs_data else self.method]
        rounded, grid, _ = method.round(Task(weight, self.form, None, self))
        if lost := underflowed(weight, rounded, grid):
            logger.warning(f"quantize: {name}: {lost} values became zero, {self.scale_dtype} has no scale so small")
        return pack_weight(rounded, self.form, scales=grid.scales, zero_points=grid.zero_points)
