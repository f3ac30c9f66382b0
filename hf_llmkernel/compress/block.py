"""One decoder block in memory: its stored tensors, its own configuration, and what stages may do to both.

Stages work on *matrices*: `q_proj`, or where it is low-rank its factors `q_proj.a` and `q_proj.b`. Whatever a matrix is
stored as, `weight` gives its dense values; `store` puts new ones back, in any form.

Shapes: O out_features, I in_features, R rank.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ..checkpoint.model_folder import block_module, in_fp32, stored_as
from ..checkpoint.precision import check_products
from ..model.configuration_llm_kernel import ATTENTION_LINEARS, MLP_LINEARS, LinearForm, LLMKernelConfig
from ..model.linear_llm_kernel import pack_weight, unpack_mask, unpack_weight
from ..model.modeling_llm_kernel import LLMKernelDecoderLayer

# Places in a block where linears take the same inputs, in the order of the computation.
SITES = {
    "attention_input": ("q_proj", "k_proj", "v_proj"),
    "attention_output": ("o_proj",),
    "mlp_input": ("gate_proj", "up_proj"),
    "mlp_output": ("down_proj",),
}
LINEARS = tuple(leaf for leaves in SITES.values() for leaf in leaves)
SUBLAYER_LINEARS = {"attention": ATTENTION_LINEARS, "mlp": MLP_LINEARS}
SUBLAYER_MODULES = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}


class Block:
    """A block that stages change.

    Args:
        index: of the layer.
        layer: its own configuration, `config.per_layer_config[index]`; stages change it.
        tensors: `{name inside the block: tensor as stored}`, as in `self_attn.q_proj.weight`; kept in fp32 until
            `cast`, so that stages after one another do not round in between.
        origin: the layer's number in the source, where layers before it were dropped; messages name it by this.

    Raises:
        ValueError: a tensor missing, unknown, or of a shape that the configuration does not have.
    """

    def __init__(
        self, index: int, layer: LLMKernelConfig, tensors: dict[str, torch.Tensor], origin: int | None = None
    ):
        self.index = index
        self.origin = index if origin is None else origin
        self.layer = layer
        self.tensors = in_fp32(tensors)
        self.notes: list[dict[str, Any]] = []
        self.check()

    def check(self) -> None:
        """Raises `ValueError` where the tensors are not those of the configuration."""
        with torch.device("meta"):
            module = LLMKernelDecoderLayer(self.layer, self.index)
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        for name in sorted(expected.keys() ^ self.tensors.keys()):
            fault = "missing" if name in expected else "not of the configuration"
            raise ValueError(f"{self.path(name)}: {fault}; config.json and the weights must be of one checkpoint.")
        for name, tensor in self.tensors.items():
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(
                    f"{self.path(name)}: has shape {list(tensor.shape)}, config.json says {list(expected[name])}; "
                    "they must be of one checkpoint."
                )

    def path(self, name: str) -> str:
        """The full name of a tensor or matrix of this block in the source, for messages."""
        leaf = name.partition(".")[0]
        return f"model.layers.{self.origin}.{module_path(name) if leaf in ATTENTION_LINEARS + MLP_LINEARS else name}"

    def note(self, **facts: Any) -> None:
        """Records what a stage has to tell of this block: a fallback, a loss."""
        self.notes.append(facts)

    # What is there

    def has(self, sublayer: str) -> bool:
        """Whether it has `"attention"` or `"mlp"`."""
        return sublayer not in (self.layer.skip or [])

    def linears(self) -> list[str]:
        """Leaf names of the linears it has, those of skipped sublayers left out."""
        return present_linears(self.layer)

    def matrices(self, site: str | None = None) -> list[str]:
        """Names of its matrices, by default of all sites, in the order of the computation."""
        return matrix_names(self.layer, site)

    def form(self, name: str) -> LinearForm:
        """The form of a linear or of a matrix."""
        return matrix_form(self.layer, name)

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        """The stored tensors of a linear or matrix by suffix, bias apart."""
        path = f"{module_path(name)}."
        found = {key.removeprefix(path): tensor for key, tensor in self.tensors.items() if key.startswith(path)}
        return {suffix: tensor for suffix, tensor in found.items() if suffix.rpartition(".")[2] != "bias"}

    def weight(self, name: str) -> torch.Tensor:
        """The dense weight of a linear or matrix, fp32 `[O, I]`."""
        form = self.form(name)
        return unpack_weight(self.stored(name), form, matrix_shape(self.layer, name)[1], torch.float32).float()

    def mask(self, name: str) -> torch.Tensor | None:
        """What a sparse matrix keeps, bool `[O, I]`; `None` where it keeps all."""
        stored = self.stored(name)
        return unpack_mask(stored["mask"], matrix_shape(self.layer, name)[1]) if "mask" in stored else None

    def bias(self, leaf: str) -> torch.Tensor | None:
        """The bias of a linear, fp32 `[O]`."""
        return self.tensors.get(self._bias_name(leaf))

    # What stages do

    def store(self, name: str, weight: torch.Tensor, form: LinearForm, **packing: torch.Tensor | None) -> None:
        """Replaces a matrix by a weight `[O, I]` in a form, bias apart; `packing` as `pack_weight` takes it.

        Raises:
            ValueError: a weight that the form cannot hold, naming the matrix.
        """
        path = module_path(name)
        try:
            stored = {"weight": weight.contiguous()} if form.is_dense else pack_weight(weight, form, **packing)
        except ValueError as error:
            raise ValueError(f"{self.path(name)}: {error}") from None
        for suffix in self.stored(name):
            del self.tensors[f"{path}.{suffix}"]
        self.tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in stored.items()}
        set_form(self.layer, name, form)

    def set_weight(self, name: str, weight: torch.Tensor) -> None:
        """Replaces the values of a matrix that keep its form: a sparse one its mask, an integer one its grid."""
        stored = self.stored(name)
        grid = {key: stored.get(key) for key in ("scales", "zero_points")}
        self.store(name, weight, self.form(name), mask=self.mask(name), **grid)

    def factorize(self, leaf: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Replaces a dense linear by two, of weights a `[R, I]` and b `[O, R]`."""
        path, bias = module_path(leaf), self.tensors.pop(self._bias_name(leaf), None)
        del self.tensors[f"{path}.weight"]
        self.tensors |= {f"{path}.a.weight": a.contiguous(), f"{path}.b.weight": b.contiguous()}
        if bias is not None:
            self.tensors[f"{path}.b.bias"] = bias
        set_form(self.layer, leaf, LinearForm(rank=len(a)))

    def set_bias(self, leaf: str, bias: torch.Tensor) -> None:
        """Gives a linear a bias `[O]`, whether it had one or not."""
        self.tensors[self._bias_name(leaf)] = bias.contiguous()
        own = LinearForm.from_dict((self.layer.linear_forms or {}).get(leaf))
        _write_form(self.layer, leaf, replace(own, bias=True))

    def keep_outputs(self, leaf: str, keep: torch.Tensor) -> None:
        """Leaves a linear only the outputs of indices `keep`, of its weight and its bias."""
        name = f"{leaf}.b" if self.form(leaf).rank is not None else leaf
        stored, mask, form = self.stored(name), self.mask(name), self.form(name)
        rows = {key: stored[key][keep] for key in ("scales", "zero_points") if key in stored}
        kept = None if mask is None else mask[keep]
        if form.nnz is not None and kept is not None:
            form = replace(form, nnz=int(kept.sum()))
        self.store(name, self.weight(name)[keep], form, mask=kept, **rows)
        bias = self.bias(leaf)
        if bias is not None:
            self.tensors[self._bias_name(leaf)] = bias[keep].contiguous()

    def scale_outputs(self, leaf: str, factors: torch.Tensor) -> None:
        """Multiplies each output of a linear by a factor of its own, `[O]`: its weight, in whatever form, and bias.

        Raises:
            ValueError: a scale beyond what its dtype can hold, naming the matrix.
        """
        name = f"{leaf}.b" if self.form(leaf).rank is not None else leaf
        scales = self.stored(name).get("scales")
        if scales is None:
            self.set_weight(name, self.weight(name) * factors.unsqueeze(1))
        else:
            scaled = (scales.float() * factors.unsqueeze(1)).to(scales.dtype)
            if not scaled.isfinite().all():
                raise ValueError(f"{self.path(name)}: scale_dtype={self.form(name).scale_dtype!r} overflows; widen it.")
            self.tensors[f"{module_path(name)}.scales"] = scaled
        bias = self.bias(leaf)
        if bias is not None:
            self.tensors[self._bias_name(leaf)] = bias * factors

    def scale_inputs(self, name: str, factors: torch.Tensor) -> None:
        """Multiplies each column of a floating matrix by a factor of its own, `[I]`."""
        assert self.form(name).bits == 16, "columns of integers share their scales"
        self.set_weight(name, self.weight(name) * factors)

    def skip(self, sublayer: str) -> None:
        """Removes a sublayer, its norm too."""
        prefixes = tuple(f"{module}." for module in SUBLAYER_MODULES[sublayer])
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(prefixes)}
        skip_sublayer(self.layer, sublayer)

    def cast(self, dtype: torch.dtype, leaves: Iterable[str] | None = None) -> None:
        """Gives floating tensors the dtype they are stored in, of some linears or of all the block.

        Scales and zero points have their form's.
        """
        prefixes = ("",) if leaves is None else tuple(f"{module_path(leaf)}." for leaf in leaves)
        for name, tensor in self.tensors.items():
            if name.startswith(prefixes):
                self.tensors[name] = stored_as(self.path(name), tensor, dtype)

    def check_products(self, dtype: torch.dtype) -> None:
        """Raises `ValueError` where a linear stands for values that a model of a dtype cannot compute."""
        for leaf in self.linears():
            shape, read = matrix_shape(self.layer, leaf), self.stored(leaf).__getitem__
            check_products(self.path(leaf), self.form(leaf), shape, dtype, read)

    def module(self) -> LLMKernelDecoderLayer:
        """The block as a module that computes in fp32 with exactly the values that are stored."""
        return block_module(self.layer, self.index, self.tensors)

    def _bias_name(self, leaf: str) -> str:
        factor = ".b" if self.form(leaf).rank is not None else ""
        return f"{module_path(leaf)}{factor}.bias"


def module_path(name: str) -> str:
    """Where a linear or matrix lies inside the block: `mlp.down_proj` for `down_proj`."""
    return f"{'self_attn' if name.partition('.')[0] in ATTENTION_LINEARS else 'mlp'}.{name}"


def present_linears(layer: LLMKernelConfig) -> list[str]:
    """Leaf names of the linears of a layer, those of skipped sublayers left out."""
    skipped = {leaf for sublayer in layer.skip or [] for leaf in SUBLAYER_LINEARS[sublayer]}
    return [leaf for leaf in layer.linear_shapes() if leaf not in skipped]


def matrix_names(layer: LLMKernelConfig, site: str | None = None) -> list[str]:
    """Names of the matrices of a layer, of one site or of all."""
    leaves = [leaf for leaf in present_linears(layer) if site is None or leaf in SITES[site]]
    split = {leaf: (f"{leaf}.a", f"{leaf}.b") for leaf in leaves if layer.linear_form(leaf).rank is not None}
    return [name for leaf in leaves for name in split.get(leaf, (leaf,))]


def matrix_form(layer: LLMKernelConfig, name: str) -> LinearForm:
    """The form of a linear or matrix of a layer."""
    leaf, _, factor = name.partition(".")
    form = layer.linear_form(leaf)
    return dict(zip("ab", form.factors, strict=True))[factor] if factor else form


def matrix_shape(layer: LLMKernelConfig, name: str) -> tuple[int, int]:
    """O and I of a linear or matrix of a layer."""
    leaf, _, factor = name.partition(".")
    out_features, in_features = layer.linear_shapes()[leaf]
    rank = layer.linear_form(leaf).rank or 0
    return {"": (out_features, in_features), "a": (rank, in_features), "b": (out_features, rank)}[factor]


def set_form(layer: LLMKernelConfig, name: str, form: LinearForm) -> None:
    """Gives a linear or matrix of a layer a form; whether it has a bias stays as it is."""
    leaf, _, factor = name.partition(".")
    own = LinearForm.from_dict((layer.linear_forms or {}).get(leaf))
    if factor:
        plain = replace(form, bias=None)
        _write_form(layer, leaf, replace(own, **{factor: None if plain == LinearForm() else plain}))
    else:
        _write_form(layer, leaf, replace(form, bias=own.bias))


def skip_sublayer(layer: LLMKernelConfig, sublayer: str) -> None:
    """Leaves a sublayer out of a layer's configuration, the forms of its linears too."""
    layer.skip = sorted({*(layer.skip or []), sublayer})
    gone = SUBLAYER_LINEARS[sublayer]
    layer.linear_forms = {leaf: form for leaf, form in (layer.linear_forms or {}).items() if leaf not in gone}


def _write_form(layer: LLMKernelConfig, leaf: str, form: LinearForm) -> None:
    forms = {key: own for key, own in (layer.linear_forms or {}).items() if key != leaf}
    if form != LinearForm():
        forms[leaf] = form.to_dict()
    layer.linear_forms = forms
