"""An accelerator that is none: its tensors lie in the CPU's memory, and refuse to meet tensors that do not say so.

What runs on it without a fault mixes no devices, and computes what the CPU does, to the bit but for the order of sums.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
aten = torch.ops.aten
BETWEEN_DEVICES = (aten._to_copy.default, aten.copy_.default)


def install() -> TorchDispatchMode:
    """Makes the accelerator of this process, for the rest of its life; it works inside of the mode."""
    _setup_privateuseone_for_python_backend(NAME)
    return Everywhere()


class Pretended(torch.Tensor):
    """A tensor on the device, and the one that holds its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        strides, offset = held.stride(), held.storage_offset()
        options = {"strides": strides, "storage_offset": offset, "dtype": held.dtype, "device": f"{NAME}:0"}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **options)  # type: ignore[attr-defined]
        tensor.held = held
        return tensor

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """Catches what makes tensors on the device, which no tensor of it takes part in."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Computes on the CPU; raises `RuntimeError` where tensors of more than no dimensions are on two devices."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    others = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.dim()]
    indexed_from_cpu = function is aten.index.Tensor and isinstance(args[0], Pretended)
    if ours and others and function not in BETWEEN_DEVICES and not indexed_from_cpu:
        raise RuntimeError(f"{function}: on two devices, on the CPU {[list(tensor.shape) for tensor in others]}")
    device = kwargs.get("device")
    stays = bool(ours) if device is None else torch.device(device).type == NAME
    if stays and device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    if function is aten.copy_.default:
        return args[0]
    known = {id(tensor.held): tensor for tensor in ours}  # of what is changed in place
    return tree_map(lambda leaf: _pretend(leaf, known), result) if stays else result


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, Pretended) else leaf


def _pretend(leaf: Any, known: dict[int, torch.Tensor]) -> Any:
    if not isinstance(leaf, torch.Tensor) or isinstance(leaf, Pretended):
        return leaf
    return known.get(id(leaf)) if id(leaf) in known else Pretended(leaf)
