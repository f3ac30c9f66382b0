"""`prune_hidden`: the residual stream becomes narrower, and with it every matrix of the model.

`hidden_size` is one for all layers, so is what stays of the stream: the stage looks at what enters every norm, decides
on directions or channels once, and changes blocks, embedding, last norm and head by weights alone.

A rotation moves the last norm's scale into the head, which then is no longer the embedding: a tied model gets a head of
its own. Only channels as they are let both stay one tensor: with E the rotated embedding, the head is E Qᵀ diag(g) Q,
and the matrix between is diagonal, as a norm's weight is, for permutations alone unless the scale is one number.

Reading order: settings -> shapes -> what the norms see -> blocks -> embedding, last norm and head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from ...checkpoint.model_folder import in_fp32
from ...model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from .. import processes
from ..block import SITES, SUBLAYER_MODULES, Block, matrix_form, matrix_names, module_path, present_linears
from ..disk import write_tensors
from ..inputs import InputStatistic
from ..plan import plan_stage, stored_sizes
from ..registry import register
from ..stage import Stage, own_form, refuse_form
from ..walk import accelerator
from .hidden_rotation import Rotation, Selection, channel_scores, normalized, principal_directions
from .width import pruned_width, select

if TYPE_CHECKING:
    from ..survey import Survey

METHODS = ("pca", "minitron")
TOP_FORMS = ("embed_tokens_form", "lm_head_form")


@register("prune_hidden")
@dataclass(frozen=True, kw_only=True)
class PruneHidden(Stage):
    """Removes a share of the residual stream.

    Args:
        ratio: share to remove, in (0, 1).
        method: `"pca"` keeps the principal directions of what enters the norms, and unties a tied head; `"minitron"`
            the channels that norms put out most of, and tied stays tied.
        align: the width that stays is a multiple of it, the nearest; matrix kernels like multiples of 64.
    """

    ratio: float
    method: str = "pca"
    align: int = 64

    structural = True
    takes_embeddings = True
    alone = True

    def __post_init__(self):
        super().__post_init__()
        if self.include != ("*",) or self.exclude or self.layers is not None or self.embeddings:
            raise ValueError(
                "include, exclude, layers and embeddings: hidden_size is one for the whole model; leave them out."
            )
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio!r}: must be above 0 and below 1; or leave the stage out.")
        if type(self.align) is not int or self.align < 1:
            raise ValueError(f"align={self.align!r}: must be an integer of at least 1; 64 suits matrix kernels.")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: must be one of {list(METHODS)}.")

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def sweeps_data(self) -> bool:
        return False

    @property
    def is_global(self) -> bool:
        return True

    # Shapes

    def plan(self, layer: LLMKernelConfig, target: Any = None) -> dict[str, Any]:
        before = layer.hidden_size
        layer.hidden_size = self._width(before)
        for name in matrix_names(layer):
            if not matrix_form(layer, name).is_dense:
                refuse_form(self.name, layer, name, "prune before sparsify and quantize.")
        for leaf in present_linears(layer):
            self._check_rank(layer.linear_form(leaf), leaf, layer.hidden_size)
        reached = 1 - layer.hidden_size / before
        facts = {"hidden_size_before": before, "hidden_size": layer.hidden_size, "ratio_reached": reached}
        return {**facts, "unties": True} if self._unties(layer) else facts

    def plan_top(self, config: LLMKernelConfig) -> None:
        config.hidden_size = self._width(config.hidden_size)
        for name in TOP_FORMS:
            form = LinearForm.from_dict(getattr(config, name))
            if not all(factor.is_dense for factor in (form.factors if form.rank else (form,))):
                raise ValueError(
                    f"{self.name}: {name} is {own_form(form)}; prune before sparsify and quantize, which leave it out."
                )
            self._check_rank(form, name, config.hidden_size)
        if self._unties(config):
            config.tie_word_embeddings = False
            config.lm_head_form = config.embed_tokens_form

    def _width(self, before: int) -> int:
        try:
            return pruned_width(before, self.ratio, self.align)
        except ValueError as error:
            raise ValueError(f"{self.name}: hidden_size: {error}") from None

    def _check_rank(self, form: LinearForm, name: str, width: int) -> None:
        if form.rank is not None and form.rank > width:
            raise ValueError(
                f"{self.name}: {name} has rank {form.rank}, above the hidden_size of {width} that stays; "
                "factorize afterwards."
            )

    def _unties(self, config: LLMKernelConfig) -> bool:
        return self.method == "pca" and bool(config.tie_word_embeddings)

    # What the norms see

    def decide(self, survey: "Survey") -> dict[str, Any]:
        """The directions or channels that stay, as tensors in a file, and the share of the stream's energy in them."""
        config = survey.config
        if self.method == "pca" and not heads(survey.source.others, config):
            raise ValueError(
                f"{self.name}: method='pca': the model has no head to take over the scale of its last norm; "
                "take one with a head, or method 'minitron'."
            )
        survey.follow(lambda block: NormInputs(survey, block, "gram" if self.method == "pca" else "moments"))
        seen = sorted(survey.folder.glob(NormInputs.FILES))
        width = self._width(config.hidden_size)
        if self.method == "pca":
            directions, shares = principal_directions(_total(seen, "gram"), width)
            tensors, kept = {"directions": directions}, float(shares[:width].sum())
        else:
            channels, squares = select(_total(seen, "scores"), width), _total(seen, "squares")
            tensors, kept = {"channels": channels}, float(squares[channels].sum() / squares.sum())
        sizes = [
            stored_sizes(shapes, torch.float32, survey.source.has_head)[0]
            for shapes in (config, plan_stage(config, self)[0])
        ]
        return {
            "tensors": survey.keep(tensors),
            "hidden_size": width,
            "energy_kept": kept,
            "unties": self._unties(config),
            "parameters_before": sizes[0],
            "parameters": sizes[1],
        }

    # What becomes of the weights

    def begin(self, block: Block, target: dict[str, torch.Tensor]) -> None:
        basis = _basis(target, block.layer.hidden_size)
        for sublayer, (_, norm) in SUBLAYER_MODULES.items():
            if not block.has(sublayer):
                continue
            gain = block.tensors[f"{norm}.weight"]
            for leaf in [leaf for leaf in SITES[f"{sublayer}_input"] if leaf in block.linears()]:
                name = f"{leaf}.a" if block.form(leaf).rank else leaf
                block.store(name, basis.read(block.weight(name), gain), block.form(name))
            for leaf in SITES[f"{sublayer}_output"]:
                name = f"{leaf}.b" if block.form(leaf).rank else leaf
                block.store(name, basis.write(block.weight(name)), block.form(name))
                bias = block.bias(leaf)
                if bias is not None:
                    block.tensors[f"{module_path(name)}.bias"] = basis.write(bias)
            block.tensors[f"{norm}.weight"] = basis.norm(gain)
        block.layer.hidden_size = self._width(block.layer.hidden_size)

    def apply(self, block: Block, site: str, inputs: InputStatistic | None, target: Any = None) -> None:
        return None

    def change_top(
        self, tensors: dict[str, torch.Tensor], config: LLMKernelConfig, target: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        basis, tensors = _basis(target, config.hidden_size), in_fp32(tensors)
        body, sources = _body(tensors), heads(tensors, config)
        norm, gain = f"{body}norm.weight", tensors[f"{body}norm.weight"]
        changed = {**tensors, norm: basis.norm(gain)}
        embedding = next(name for name in tensors if name.startswith(f"{body}embed_tokens.") and _is_reader(name))
        changed[embedding] = basis.write(tensors[embedding].T).T
        if self.method == "minitron" and any(name != source for name, source in sources.items()):
            changed[norm] /= basis.scale  # the embedding stays the head, and has s in it
            return changed
        for name, source in sources.items():
            changed[name] = basis.read(tensors[source], gain) if _is_reader(name) else tensors[source].clone()
        return changed


class NormInputs:
    """What enters the norms of a block, and behind the last block the last norm; summed over norms, in a file.

    `gram` `[H, H]` of hidden states with a root mean square of one; or their `squares` `[H]`, and `scores` `[H]` of
    `channel_scores`.
    """

    FILES = "norms-*.safetensors"

    def __init__(self, survey: "Survey", block: Block, needs: str):
        self.file = survey.folder / self.FILES.replace("*", f"{block.index:05d}")
        parts = {sublayer: f"{norm}.weight" for sublayer, (_, norm) in SUBLAYER_MODULES.items() if block.has(sublayer)}
        self.gains = {sublayer: block.tensors[name] for sublayer, name in parts.items()}
        if block.index + 1 == len(survey.layers):
            self.gains["layer"] = survey.source.norm().weight.detach().to(accelerator())
        self.seen = {part: InputStatistic(needs) for part in self.gains}

    def __call__(self, part: str, before: torch.Tensor, after: torch.Tensor) -> None:
        if part in self.seen:
            hidden = after if part == "layer" else before
            self.seen[part].add(normalized(hidden.to(self.gains[part].device)))

    def found(self) -> dict[str, Any]:
        """Writes the file."""
        sums: dict[str, torch.Tensor] = {}
        for part, statistic in self.seen.items():
            gain = self.gains[part]
            if not statistic.count:  # a process without samples
                statistic.add(gain.new_empty(0, len(gain)))
            statistic.all_reduce()
            if statistic.needs == "gram":
                found = {"gram": statistic.gram}
            else:
                found = {"squares": statistic.squares, "scores": channel_scores(statistic.mean_magnitude, gain)}
            for name, tensor in found.items():
                sums[name] = sums.get(name, torch.zeros(())) + tensor.cpu()
        if processes.is_first():
            write_tensors(self.file, sums)
        return {}


def heads(names: Iterable[str], config: LLMKernelConfig) -> dict[str, str]:
    """Names of the tensors behind the last norm and of those that they come from: a tied head's are the embedding's."""
    names = list(names)
    body = _body(names)
    embedding = f"{body}embed_tokens."
    own = [name for name in names if not name.startswith((embedding, f"{body}norm."))]
    if own or not body or not config.tie_word_embeddings:
        return {name: name for name in own}
    return {name.replace(embedding, "lm_head."): name for name in names if name.startswith(embedding)}


def _body(names: Iterable[str]) -> str:
    """What names of the body begin with: `model.`, or nothing where it was saved alone."""
    return next(name.partition("embed_tokens.")[0] for name in names if "embed_tokens." in name)


def _is_reader(name: str) -> bool:
    """Whether a tensor of a head or an embedding, stored `[V, H]`, has H columns: of a low rank the first factor's."""
    return name.endswith(".weight") and not name.endswith(".b.weight")


def _basis(tensors: dict[str, torch.Tensor], channels: int) -> Rotation | Selection:
    if "directions" in tensors:
        return Rotation(tensors["directions"])
    return Selection(tensors["channels"], channels)


def _total(files: list[Path], name: str) -> torch.Tensor:
    """The sum over all layers of what their files have by a name, fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for file in files:
        total = total + load_file(file).get(name, torch.zeros(()))
    return total
