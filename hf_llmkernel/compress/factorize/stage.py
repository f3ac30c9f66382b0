"""`factorize`: linears as products of two thin ones, `y = b(a(x))`.

`svd` takes the nearest matrix of a rank, `svd_llm` the one whose outputs on calibration data are nearest.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ..block import Block, matrix_form, matrix_shape, present_linears, set_form
from ..inputs import InputStatistic
from ..registry import register
from ..stage import MatrixStage, refuse_form
from .rank import allocate_ranks, rank_for_energy, rank_for_ratio
from .svd import truncated_svd
from .svd_llm import output_components, output_energies, svd_llm

if TYPE_CHECKING:
    from ..survey import Survey

METHODS = ("svd_llm", "svd")
ALLOCATIONS = ("uniform", "global")
ASSUMED_RATIO = 0.2  # of a plan by energy


@register("factorize")
@dataclass(frozen=True, kw_only=True)
class Factorize(MatrixStage):
    """Stores dense linears as two of low rank, where that saves parameters.

    Args:
        ratio: share of parameters to save; of each linear, or of all together where `allocation` is `"global"`.
        energy: instead of `ratio`: share of the (whitened) spectrum that each rank keeps at least.
        method: `"svd_llm"` or `"svd"`.
        allocation: `"uniform"`, or `"global"`: ranks that lose least relative to each linear's outputs, over all.
        align: ranks are multiples of it.
    """

    ratio: float | None = None
    energy: float | None = None
    method: str = "svd_llm"
    allocation: str = "uniform"
    align: int = 16

    def __post_init__(self):
        super().__post_init__()
        if (self.ratio is None) == (self.energy is None):
            raise ValueError(f"ratio={self.ratio!r}, energy={self.energy!r}: set one of the two.")
        for name in ("ratio", "energy"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, float) or not 0 < value < 1):
                raise ValueError(f"{name}={value!r}: must be above 0 and below 1.")
        if type(self.align) is not int or self.align < 1:
            raise ValueError(f"align={self.align!r}: must be an integer of at least 1; 16 suits matrix kernels.")
        for name, legal in (("method", METHODS), ("allocation", ALLOCATIONS)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {list(legal)}.")
        if self.allocation == "global" and self.ratio is None:
            raise ValueError("allocation='global': shares a budget; set ratio instead of energy.")

    @property
    def needs_data(self) -> bool:
        return self.method == "svd_llm"

    @property
    def is_global(self) -> bool:
        return self.allocation == "global" or self.energy is not None

    @property
    def statistic(self) -> str:
        return "gram"

    @property
    def solve_products(self) -> float:
        return 20.0

    def decide(self, survey: "Survey") -> dict[str, Any]:
        """Ranks of every linear, `{"targets": [{leaf: rank or null}, …]}`, from their spectra."""

        def look(block: Block, site: str | None, inputs: InputStatistic | None) -> dict[str, Any]:
            return {leaf: self._spectrum(block, leaf, inputs).tolist() for leaf in self.chosen(block.matrices(site))}

        found = (
            survey.observe(self.needs, look) if self.needs_data else survey.weigh(lambda block: look(block, None, None))
        )
        keys = [(index, leaf) for index, spectra in enumerate(found) if self.covers(index) for leaf in spectra]
        spectra = [torch.tensor(found[index][leaf], dtype=torch.float64) for index, leaf in keys]
        shapes = [matrix_shape(survey.layers[index], leaf) for index, leaf in keys]
        ranks = self._ranks(spectra, shapes)
        if not any(ranks):
            raise ValueError(
                f"factorize: energy={self.energy}: no linear keeps so much at a rank that saves parameters; lower it, "
                "or leave the stage out."
            )
        targets: list[dict[str, int | None]] = [{} for _ in found]
        for (index, leaf), rank in zip(keys, ranks, strict=True):
            targets[index][leaf] = rank
        return {"targets": targets}

    def _spectrum(self, block: Block, leaf: str, inputs: InputStatistic | None) -> torch.Tensor:
        weight = block.weight(leaf)
        if inputs is not None:
            return output_energies(weight, inputs.gram)
        return torch.linalg.svdvals(weight).double().square()

    def _ranks(self, spectra: list[torch.Tensor], shapes: list[tuple[int, int]]) -> list[int | None]:
        if self.energy is not None:
            pairs = zip(spectra, shapes, strict=True)
            return [rank_for_energy(spectrum, *shape, self.energy, self.align) for spectrum, shape in pairs]
        total = sum(rows * columns for rows, columns in shapes)
        relative = [spectrum / spectrum.sum() for spectrum in spectra]
        return allocate_ranks(relative, shapes, round(total * (1 - (self.ratio or 0))), self.align)

    def plan(self, layer: LLMKernelConfig, target: dict[str, int | None] | None = None) -> dict[str, Any]:
        """Without a target, an energy is planned as a ratio of 0.2: spectra are not known then."""
        ranks: dict[str, int | None] = {}
        for leaf in self.chosen(present_linears(layer)):
            if not matrix_form(layer, leaf).is_dense:
                refuse_form("factorize", layer, leaf, "only dense linears can be: exclude it, or factorize first.")
            rank = self._rank(layer, leaf, target)
            ranks[leaf] = rank
            if rank is not None:
                set_form(layer, leaf, LinearForm(rank=rank))
        assumed = {"assumed": f"ratio {ASSUMED_RATIO}"} if self.energy is not None and target is None else {}
        return {"ranks": ranks, "ratio_reached": _share_saved(layer, ranks), **assumed}

    def _rank(self, layer: LLMKernelConfig, leaf: str, target: dict[str, int | None] | None) -> int | None:
        if target is not None:
            return target.get(leaf)
        try:
            return rank_for_ratio(*matrix_shape(layer, leaf), self.ratio or ASSUMED_RATIO, self.align)
        except ValueError as error:
            raise ValueError(f"factorize: {leaf}: {error}") from None

    def change(
        self, block: Block, name: str, inputs: InputStatistic | None, target: dict[str, int | None] | None
    ) -> None:
        rank = self._rank(block.layer, name, target)
        if rank is None:
            return
        weight = block.weight(name)
        if inputs is None:
            factors = truncated_svd(weight, rank)
        else:
            components = output_components(weight, inputs.gram)
            factors, loss = svd_llm(weight, components, rank)
            block.note(stage=self.name, matrix=name, loss=loss / max(float(components.energies.sum()), 1e-30))
        block.factorize(name, *factors)


def _share_saved(layer: LLMKernelConfig, ranks: dict[str, int | None]) -> float:
    """The share of these linears' parameters that their ranks save."""
    shapes = {leaf: layer.linear_shapes()[leaf] for leaf in ranks}
    dense = sum(rows * columns for rows, columns in shapes.values())
    kept = sum((rank * sum(shapes[leaf])) if rank else math.prod(shapes[leaf]) for leaf, rank in ranks.items())
    return 1 - kept / dense if dense else 0.0
