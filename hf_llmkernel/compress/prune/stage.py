"""`prune_ffn` and `prune_heads`: whole feed-forward neurons and attention heads are removed, widths stay dense.

Both look at what enters the linear that sums them up (down_proj, o_proj), score groups of its columns, remove the
lowest, and let those that stay, or a bias, take over what was lost.

Reading order: importance by method -> the shared stage -> neurons -> heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch

from ...model.configuration_llm_kernel import MLP_LINEARS, LLMKernelConfig
from ..block import Block, matrix_form
from ..inputs import InputStatistic
from ..registry import register
from ..stage import Stage, refuse_form
from .compensation import Compensation, least_squares_columns, least_squares_with_bias, mean_bias
from .flap import flap_scores, standardize
from .heads import SCHEMES, head_indices, head_scores, pruned_heads, select_heads, value_rows
from .magnitude import magnitude_scores
from .minitron import minitron_head_scores, minitron_neuron_scores
from .obs import obs_scores, obs_select
from .wanda import wanda_scores
from .width import allocate_widths, pruned_width, select

if TYPE_CHECKING:
    from ..survey import Survey

UPDATES = ("least_squares", "least_squares_bias", "bias", "none")
ALLOCATIONS = ("uniform", "global")


class Columns(NamedTuple):
    """What a method scores: columns of the weight `[O, I]` of a linear.

    `feeding` are the weights `[I, H]` whose rows make these inputs, `inputs` their statistic (`None` without
    calibration), `group_size` the columns of a head, 1 for neurons.
    """

    weight: torch.Tensor
    feeding: list[torch.Tensor]
    inputs: InputStatistic
    group_size: int


class Importance(NamedTuple):
    """What a method needs to know of the inputs (see `InputStatistic`; `None`: nothing), and its scores of groups."""

    needs: str | None
    scores: Callable[[Columns], torch.Tensor]


def _minitron(columns: Columns) -> torch.Tensor:
    inputs = columns.inputs
    if columns.group_size == 1:
        return minitron_neuron_scores(inputs.mean_magnitude * inputs.count, inputs.count)
    return minitron_head_scores(inputs.norm.square(), columns.group_size, inputs.count)


def _by_group(columns: Columns, scores: torch.Tensor) -> torch.Tensor:
    return head_scores(scores, columns.group_size)


METHODS = {
    "magnitude": Importance(None, lambda c: _by_group(c, magnitude_scores(c.weight, *c.feeding))),
    "wanda": Importance("moments", lambda c: _by_group(c, wanda_scores(c.weight, c.inputs.norm))),
    "flap": Importance("moments", lambda c: _by_group(c, flap_scores(c.weight, c.inputs.variance))),
    "minitron": Importance("moments", _minitron),
    "obs": Importance("gram", lambda c: obs_scores(c.weight, c.inputs.gram, c.group_size)[0]),
}


@dataclass(frozen=True, kw_only=True)
class PruneGroups(Stage):
    """Removes a share of the groups of columns of one linear in every layer.

    Args:
        ratio: share to remove, in (0, 1).
        method: `"wanda"`, `"flap"`, `"minitron"`, `"magnitude"`, or `"obs"`, what is lost after compensation.
        allocation: `"uniform"` removes as much in every layer, `"global"` by one threshold on standardized scores.
        update: what takes over: `"least_squares"` those that stay, `"bias"` a bias (FLAP), `"least_squares_bias"` both,
            `"none"` nothing.
        dampening: of the least squares, relative to the mean of the diagonal of the Gram matrix.
    """

    ratio: float
    method: str = "wanda"
    allocation: str = "uniform"
    update: str = "least_squares"
    dampening: float = 0.1

    structural = True
    site: ClassVar[str] = ""
    linear: ClassVar[str] = ""
    sublayer: ClassVar[str] = ""

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio!r}: must be above 0 and below 1; or leave the stage out.")
        if not isinstance(self.dampening, int | float) or not 0 <= self.dampening < math.inf:
            raise ValueError(f"dampening={self.dampening!r}: must be a number of at least 0; 0.1 is the default.")
        for name, legal in (("method", [*METHODS]), ("update", UPDATES), ("allocation", ALLOCATIONS)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {list(legal)}.")
        if self.include != ("*",) or self.exclude:
            raise ValueError(
                "include and exclude: whole groups are removed from all linears they run through; restrict by layers."
            )

    @property
    def needs_data(self) -> bool:
        return self._statistic is not None

    @property
    def is_global(self) -> bool:
        return self.allocation == "global"

    @property
    def _statistic(self) -> str | None:
        if self.update.startswith("least_squares"):
            return "gram"
        return METHODS[self.method].needs or ("moments" if self.update == "bias" else None)

    def needs(self, layer: LLMKernelConfig) -> dict[str, str]:
        absent = self.sublayer in (layer.skip or [])
        return {} if absent or self._statistic is None else {self.site: self._statistic}

    def decide(self, survey: "Survey") -> dict[str, Any]:
        def look(block: Block, site: str, inputs: InputStatistic) -> dict[str, Any]:
            return {"scores": self.unit_scores(block, inputs).tolist()} if site == self.site else {}

        if METHODS[self.method].needs is None:
            nothing = InputStatistic()
            found = survey.weigh(lambda block: look(block, self.site, nothing) if block.has(self.sublayer) else {})
        else:
            found = survey.observe(self.needs, look)
        layers = [index for index, entry in enumerate(found) if "scores" in entry and self.covers(index)]
        scores = [standardize(torch.tensor(found[index]["scores"])) for index in layers]
        widths = allocate_widths(scores, self.ratio, self.unit_align)
        targets: list[int | None] = [None] * len(found)
        for index, width in zip(layers, widths, strict=True):
            targets[index] = width
        return {"targets": targets}

    @property
    def unit_align(self) -> int:
        """What a global decision rounds the number of kept units to."""
        return 1

    def unit_scores(self, block: Block, inputs: InputStatistic) -> torch.Tensor:
        """Scores of what a global decision counts."""
        return self.scores(block, inputs)

    def scores(self, block: Block, inputs: InputStatistic) -> torch.Tensor:
        """Scores of the groups of a block, fp32."""
        columns = Columns(self._weight(block), self.feeding(block), inputs, self.group_size(block.layer))
        return METHODS[self.method].scores(columns)

    def feeding(self, block: Block) -> list[torch.Tensor]:
        """The weights whose rows make the columns."""
        return []

    def group_size(self, layer: LLMKernelConfig) -> int:
        return 1

    def _matrix(self, block: Block) -> str:
        """The matrix that takes the inputs: of a low rank its first factor."""
        return f"{self.linear}.a" if block.form(self.linear).rank is not None else self.linear

    def _weight(self, block: Block) -> torch.Tensor:
        return block.weight(self.linear)

    def take_over(self, block: Block, inputs: InputStatistic | None, keep: torch.Tensor) -> None:
        """Leaves the linear only the columns `keep`, and lets them or a bias make up for the others."""
        name = self._matrix(block)
        new = self._compensate(block.weight(name), inputs, keep)
        if new.dampening > self.dampening:
            block.note(stage=self.name, linear=self.linear, dampening=new.dampening)
        if new.bias is not None:
            added = block.weight(f"{self.linear}.b") @ new.bias if name != self.linear else new.bias
            before = block.bias(self.linear)
            block.set_bias(self.linear, added if before is None else before + added)
        block.store(name, new.weight, block.form(name))

    def _compensate(self, weight: torch.Tensor, inputs: InputStatistic | None, keep: torch.Tensor) -> Compensation:
        if self.update == "none" or inputs is None:
            return Compensation(weight[:, keep], None, 0.0)
        if self.update == "bias":
            return mean_bias(weight, inputs.mean, keep)
        if self.update == "least_squares":
            return least_squares_columns(weight, inputs.gram, keep, self.dampening)
        return least_squares_with_bias(weight, inputs.gram, inputs.mean, inputs.count, keep, self.dampening)

    def check_forms(self, layer: LLMKernelConfig) -> None:
        """Raises `ValueError` where the linear that sums up is stored in a form whose columns cannot be taken out."""
        form = matrix_form(layer, self.linear)
        first = form.factors[0] if form.rank is not None else form
        if first.is_packed:
            refuse_form(self.name, layer, self.linear, "prune before sparsify and quantize, or skip its layers.")

    def plan_bias(self, layer: LLMKernelConfig) -> None:
        """Gives the linear's form the bias that the update adds."""
        if self.update in ("bias", "least_squares_bias"):
            forms = dict(layer.linear_forms or {})
            forms[self.linear] = {"version": 1, **forms.get(self.linear, {}), "bias": True}
            layer.linear_forms = forms


@register("prune_ffn")
@dataclass(frozen=True, kw_only=True)
class PruneFFN(PruneGroups):
    """Removes a share of the feed-forward neurons.

    A neuron j is row j of gate_proj and up_proj and column j of down_proj.

    Args:
        align: the width that stays is a multiple of it, the nearest; matrix kernels like multiples of 64.
    """

    align: int = 64

    site = "mlp_output"
    linear = "down_proj"
    sublayer = "mlp"

    def __post_init__(self):
        super().__post_init__()
        if type(self.align) is not int or self.align < 1:
            raise ValueError(f"align={self.align!r}: must be an integer of at least 1; 64 suits matrix kernels.")

    @property
    def unit_align(self) -> int:
        return self.align

    def feeding(self, block: Block) -> list[torch.Tensor]:
        return [block.weight(leaf) for leaf in ("gate_proj", "up_proj") if leaf in block.linears()]

    def plan(self, layer: LLMKernelConfig, target: int | None = None) -> dict[str, Any]:
        if self.sublayer in (layer.skip or []):
            return {}
        self.check_forms(layer)
        before = layer.intermediate_size
        layer.intermediate_size = self._width(before, target)
        self.plan_bias(layer)
        reached = 1 - layer.intermediate_size / before
        return {"neurons_before": before, "neurons": layer.intermediate_size, "ratio_reached": reached}

    def _width(self, before: int, target: int | None) -> int:
        if target is not None:
            return target
        try:
            return pruned_width(before, self.ratio, self.align)
        except ValueError as error:
            raise ValueError(f"prune_ffn: {error}") from None

    def apply(
        self, block: Block, site: str, inputs: InputStatistic | None, target: int | None = None
    ) -> torch.Tensor | None:
        if site != self.site or not block.has(self.sublayer):
            return None
        keep = self._keep(block, inputs, self._width(block.layer.intermediate_size, target))
        if len(keep) == block.layer.intermediate_size:
            return None
        self.take_over(block, inputs, keep)
        for leaf in MLP_LINEARS[:-1]:
            if leaf in block.linears():
                block.keep_outputs(leaf, keep)
        block.layer.intermediate_size = len(keep)
        return keep

    def _keep(self, block: Block, inputs: InputStatistic | None, width: int) -> torch.Tensor:
        if self.method == "obs" and inputs is not None:
            return obs_select(self._weight(block), inputs.gram, width, dampening=self.dampening)[0]
        return select(self.scores(block, inputs or InputStatistic()), width)


@register("prune_heads")
@dataclass(frozen=True, kw_only=True)
class PruneHeads(PruneGroups):
    """Removes a share of the attention heads.

    Args:
        scheme: `"groups"` removes kv heads with their query heads, `"within_groups"` as many query heads from each kv
            head; either way every kv head serves as many query heads as any other.
    """

    scheme: str = "groups"

    site = "attention_output"
    linear = "o_proj"
    sublayer = "attention"

    def __post_init__(self):
        super().__post_init__()
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme={self.scheme!r}: must be one of {list(SCHEMES)}.")
        if self.is_global and self.scheme != "groups":
            raise ValueError("allocation='global': counts whole kv groups; set scheme to 'groups'.")

    def feeding(self, block: Block) -> list[torch.Tensor]:
        return [block.weight("v_proj")[value_rows(*head_shape(block.layer))]]

    def group_size(self, layer: LLMKernelConfig) -> int:
        return head_shape(layer)[2]

    def unit_scores(self, block: Block, inputs: InputStatistic) -> torch.Tensor:
        return self.scores(block, inputs).view(head_shape(block.layer)[1], -1).sum(1)

    def plan(self, layer: LLMKernelConfig, target: int | None = None) -> dict[str, Any]:
        if self.sublayer in (layer.skip or []):
            return {}
        self.check_forms(layer)
        before = layer.num_attention_heads
        heads, groups = self._counts(layer, target)
        layer.num_attention_heads, layer.num_key_value_heads = heads, groups
        self.plan_bias(layer)
        return {"heads_before": before, "heads": heads, "key_value_heads": groups, "ratio_reached": 1 - heads / before}

    def _counts(self, layer: LLMKernelConfig, target: int | None) -> tuple[int, int]:
        heads, groups, _ = head_shape(layer)
        if target is not None:
            return target * heads // groups, target
        try:
            return pruned_heads(heads, groups, self.ratio, self.scheme)
        except ValueError as error:
            raise ValueError(f"prune_heads: {error}") from None

    def apply(
        self, block: Block, site: str, inputs: InputStatistic | None, target: int | None = None
    ) -> torch.Tensor | None:
        if site != self.site or not block.has(self.sublayer):
            return None
        layer = block.layer
        before, groups_before, size = head_shape(layer)
        heads, groups = self._counts(layer, target)
        if (heads, groups) == (before, groups_before):
            return None
        kept = select_heads(self.scores(block, inputs or InputStatistic()), groups_before, heads, groups)
        keep = head_indices(kept.query, size)
        self.take_over(block, inputs, keep)
        for leaf, indices in (("q_proj", kept.query), ("k_proj", kept.key_value), ("v_proj", kept.key_value)):
            block.keep_outputs(leaf, head_indices(indices, size))
        layer.num_attention_heads, layer.num_key_value_heads = heads, groups
        return keep


def head_shape(layer: LLMKernelConfig) -> tuple[int, int, int]:
    """Query heads, key/value heads and head_dim of a layer."""
    return layer.num_attention_heads, cast(int, layer.num_key_value_heads), cast(int, layer.head_dim)
