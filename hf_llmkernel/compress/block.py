"""One decoder block in memory: its stored tensors, its own configuration, and the module they make."""

import torch

from ..model.configuration_llm_kernel import ATTENTION_LINEARS, LinearForm, LLMKernelConfig
from ..model.linear_llm_kernel import pack_weight
from ..model.modeling_llm_kernel import LLMKernelDecoderLayer

EXACT_SUFFIXES = ("scales", "zero_points")  # keep the dtype of their form, whatever the model's


class Block:
    """A block that stages change.

    Args:
        index: of the layer.
        layer: its own configuration, `config.per_layer_config[index]`; stages change it.
        tensors: `{name inside the block: tensor as stored}`, as in `self_attn.q_proj.weight`.

    Raises:
        ValueError: a tensor missing, unknown, or of a shape that the configuration does not have.
    """

    def __init__(self, index: int, layer: LLMKernelConfig, tensors: dict[str, torch.Tensor]):
        self.index = index
        self.layer = layer
        self.tensors = tensors
        self.check()

    def check(self) -> None:
        """Raises `ValueError` where the tensors are not those of the configuration."""
        expected = {name: tuple(tensor.shape) for name, tensor in self._empty_module().state_dict().items()}
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
        """The full name of a tensor or linear of this block, for messages."""
        return f"model.layers.{self.index}.{name}"

    def linear_path(self, leaf: str) -> str:
        """Where a linear lies inside the block: `mlp.down_proj` for `down_proj`."""
        return f"{'self_attn' if leaf in ATTENTION_LINEARS else 'mlp'}.{leaf}"

    def linears(self) -> list[str]:
        """Leaf names of the linears it has, those of skipped sublayers left out."""
        skipped = self.layer.skip or []
        absent = {"self_attn": "attention" in skipped, "mlp": "mlp" in skipped}
        return [leaf for leaf in self.layer.linear_shapes() if not absent[self.linear_path(leaf).split(".")[0]]]

    def weight(self, leaf: str) -> torch.Tensor:
        """The weight `[O, I]` of a dense linear in fp32."""
        return self.tensors[f"{self.linear_path(leaf)}.weight"].float()

    def set_weight(self, leaf: str, weight: torch.Tensor) -> None:
        """Replaces the weight of a dense linear, in the dtype it had."""
        name = f"{self.linear_path(leaf)}.weight"
        self.tensors[name] = weight.to(self.tensors[name].dtype).contiguous()

    def keep_outputs(self, leaf: str, keep: torch.Tensor) -> None:
        """Leaves a dense linear only the outputs of indices `keep`, of its weight and its bias."""
        for name in (f"{self.linear_path(leaf)}.{suffix}" for suffix in ("weight", "bias")):
            if name in self.tensors:
                self.tensors[name] = self.tensors[name][keep]

    def pack(self, leaf: str, form: LinearForm) -> None:
        """Stores a dense linear in a packed form; the layer's configuration must name that form too."""
        weight = self.tensors.pop(f"{self.linear_path(leaf)}.weight")
        try:
            packed = pack_weight(weight.float(), form)
        except ValueError as error:
            raise ValueError(f"{self.path(self.linear_path(leaf))}: {error}") from None
        self.tensors |= {f"{self.linear_path(leaf)}.{suffix}": tensor for suffix, tensor in packed.items()}

    def cast(self, dtype: torch.dtype) -> None:
        """Gives every floating tensor the dtype it is stored in; scales and zero points have their form's."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = stored_as(name, tensor, dtype)

    def module(self) -> LLMKernelDecoderLayer:
        """The block as a module that computes in fp32 with exactly the values that are stored."""
        module = self._empty_module()
        exact = {name: stored_as(name, tensor, torch.float32) for name, tensor in self.tensors.items()}
        module.load_state_dict(exact, assign=True)
        return module.eval()

    def _empty_module(self) -> LLMKernelDecoderLayer:
        with torch.device("meta"):
            return LLMKernelDecoderLayer(self.layer, self.index)


def stored_as(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in the model's dtype, but for integers, and scales and zero points, which have their own.

    Raises:
        ValueError: values beyond the range of the dtype.
    """
    if not tensor.is_floating_point() or name.rpartition(".")[2] in EXACT_SUFFIXES:
        return tensor
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and not cast.isfinite().all():
        raise ValueError(f"dtype={str(dtype)[6:]}: {name} has values beyond its range; choose bfloat16 or float32.")
    return cast


def group_by_block(names: list[str], prefix: str) -> tuple[dict[int, list[str]], list[str]]:
    """Names of a checkpoint's tensors by the layer they belong to, and those that belong to none."""
    blocks: dict[int, list[str]] = {}
    others = []
    for name in names:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdigit() and rest:
            blocks.setdefault(int(number), []).append(name)
        else:
            others.append(name)
    return blocks, others
