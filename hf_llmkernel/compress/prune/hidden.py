"""`prune_hidden`: the residual stream becomes narrower, and with it every matrix of the model.

`hidden_size` is one for all layers, so is what stays of the stream: the stage looks at what enters every norm, decides
on directions or channels once, and changes blocks, embedding, last norm and head by weights alone.

A rotation moves the last norm's scale into the head, which then is no longer the embedding. To untie a tied model costs
a second matrix of the vocabulary: SmolLM2-135M, of hidden size 512 instead of 576, would have 8 % more parameters. So
it stays tied unless asked: the rotation then mixes only channels whose scales are alike, and what spread is left is
shared between embedding and head. Channels as they are stay tied without any loss.

Reading order: settings -> shapes -> what the norms see -> blocks -> embedding, last norm and head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from ... import processes
from ...checkpoint.model_folder import in_fp32
from ...convert.families import describe_stored
from ...model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ..block import SITES, SUBLAYER_MODULES, Block, matrix_form, matrix_names, module_path, present_linears
from ..disk import write_tensors
from ..inputs import InputStatistic
from ..plan import plan_stage, stored_sizes
from ..registry import register
from ..stage import Stage, refuse_form
from ..walk import accelerator
from .hidden_rotation import (
    Rotation,
    Selection,
    alike_channels,
    balanced_scales,
    channel_scores,
    normalized,
    principal_directions,
)
from .width import pruned_width, select

if TYPE_CHECKING:
    from ..survey import Survey

METHODS = ("pca", "minitron")
# Of scales that count as alike. Of SmolLM2-135M 549 of 576 channels are; perplexities of 0.1 to 0.4 are within 6 %.
SPREAD = 0.25
TOP_FORMS = ("embed_tokens_form", "lm_head_form")


@register("prune_hidden")
@dataclass(frozen=True, kw_only=True)
class PruneHidden(Stage):
    """Removes a share of the residual stream.

    Args:
        ratio: share to remove, in (0, 1).
        method: `"pca"` keeps the principal directions of what enters the norms, `"minitron"` the channels that norms
            put out most of.
        untie: whether `"pca"` gives a tied model a head of its own: nothing but the directions is lost then, but there
            are vocabulary x width more parameters.
        align: the width that stays is a multiple of it, the nearest; matrix kernels like multiples of 64.
    """

    ratio: float
    method: str = "pca"
    untie: bool = False
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
        if not isinstance(self.untie, bool):
            raise ValueError(f"untie={self.untie!r}: must be true or false.")
        if self.untie and self.method != "pca":
            raise ValueError(f"untie=true: method {self.method!r} loses nothing by a tied head; leave it out.")

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
                    f"{self.name}: {name} is stored as {describe_stored(form)}; prune before sparsify and quantize, "
                    "which leave it out."
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
        return self.untie and bool(config.tie_word_embeddings)

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
        tensors, share = self._directions(survey, seen, width) if self.method == "pca" else _channels(seen, width)
        sizes = [
            stored_sizes(shapes, torch.float32, survey.source.has_head)[0]
            for shapes in (config, plan_stage(config, self)[0])
        ]
        return {
            "tensors": survey.keep(tensors),
            "hidden_size": width,
            "energy_kept": share,
            "unties": self._unties(config),
            "parameters_before": sizes[0],
            "parameters": sizes[1],
        }

    def _directions(self, survey: "Survey", seen: list[Path], width: int) -> tuple[dict[str, torch.Tensor], float]:
        """Q, and for a head that stays the embedding what `balanced_scales` says, of K columns."""
        gram = _total(seen, "gram")
        if self.untie or not shares_embedding(survey.source.others, survey.config):
            columns, share, _ = principal_directions(gram, width)
            return {"directions": columns}, share
        gain = survey.source.norm().weight.detach()
        groups = alike_channels(gain, SPREAD)
        columns, share, numbers = principal_directions(gram, width, groups)
        balance, scales = balanced_scales(gain, groups)
        return {"directions": columns, "balance": balance, "scales": scales[numbers]}, share

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
        changed[embedding] = basis.write((tensors[embedding] * target.get("balance", 1.0)).T).T
        if shares_embedding(tensors, config) and not self.untie:
            scales = target["scales"] if "scales" in target else gain[target["channels"]]
            return {**changed, norm: scales / basis.scale**2}  # the head has s in it, as the embedding that it is
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


def shares_embedding(names: Iterable[str], config: LLMKernelConfig) -> bool:
    """Whether what is behind the last norm is the embedding."""
    return any(name != source for name, source in heads(names, config).items())


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


def _channels(seen: list[Path], width: int) -> tuple[dict[str, torch.Tensor], float]:
    """The channels that stay, and the share of the energy in them."""
    channels, squares = select(_total(seen, "scores"), width), _total(seen, "squares")
    return {"channels": channels}, float(squares[channels].sum() / squares.sum())


def _total(files: list[Path], name: str) -> torch.Tensor:
    """The sum over all layers of what their files have by a name, fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for file in files:
        total = total + load_file(file).get(name, torch.zeros(()))
    return total
