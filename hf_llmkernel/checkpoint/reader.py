"""Reading a folder of safetensors, one tensor or a piece of one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from .header import StoredTensor, read_bytes, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
BLOCK_BYTES = 16 << 20


class CheckpointReader:
    """The tensors of a checkpoint folder by name; every shard is checked at once, its data read only when asked for.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.
        check_finite: whether reading a floating tensor raises where it holds NaN or an infinity.

    Raises:
        ValueError: no safetensors (pickle files are named), a shard missing, truncated or damaged, an index naming a
            key that its shard lacks, or a key in two shards.
    """

    def __init__(self, folder: str | Path, check_finite: bool = True):
        self.folder = Path(folder)
        self.check_finite = check_finite
        index = self.folder / INDEX_FILE
        if (single := self.folder / SINGLE_FILE).is_file():
            self._tensors = read_header(single)
        elif index.is_file():
            self._tensors = _read_shards(self.folder, index)
        else:
            raise ValueError(_missing_weights(self.folder))

    def keys(self) -> list[str]:
        """Names of all tensors, shard by shard."""
        return list(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        return self._entry(key).dtype

    def file(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self._entry(key).path

    def stored(self, key: str) -> StoredTensor:
        """Where a tensor lies."""
        return self._entry(key)

    def tensor(self, key: str) -> torch.Tensor:
        """One whole tensor in memory of its own. Raises `ValueError` naming key and file where it is not finite."""
        entry = self._entry(key)
        tensor = read_bytes(entry.path, entry.offset, entry.nbytes).view(entry.dtype).view(entry.shape)
        if self.check_finite:
            check_finite(key, tensor, entry.path)
        return tensor

    def blocks(self, key: str, block_bytes: int = BLOCK_BYTES) -> Iterator[torch.Tensor]:
        """A tensor in flat pieces `[n]` of at most `block_bytes`, in order, so that none is ever whole in memory."""
        entry = self._entry(key)
        step = max(block_bytes // entry.dtype.itemsize, 1) * entry.dtype.itemsize
        for begin in range(0, entry.nbytes, step):
            block = read_bytes(entry.path, entry.offset + begin, min(step, entry.nbytes - begin)).view(entry.dtype)
            if self.check_finite:
                check_finite(key, block, entry.path)
            yield block

    def _entry(self, key: str) -> StoredTensor:
        if key not in self._tensors:
            raise ValueError(f"{key}: not in the checkpoint {self.folder}; its config.json and weights must be of one.")
        return self._tensors[key]


def is_finite(values: torch.Tensor) -> bool:
    """Whether no floating value is NaN or infinite; by the extremes, which is many times faster than value by value."""
    if not values.is_floating_point() or not values.numel():
        return True
    exact = values.float() if values.dtype.itemsize == 1 else values  # torch compares no 8-bit floats
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(exact))


def check_finite(key: str, block: torch.Tensor, path: Path) -> None:
    """Raises `ValueError` where a floating tensor, or a piece of it, holds NaN or an infinity."""
    if not is_finite(block):
        kind = "NaN" if block.float().isnan().any() else "an infinity"
        raise ValueError(f"{key}: holds {kind} in {path}; the file is damaged or training diverged: use another one.")


def _read_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = _read_weight_map(index)
    shards = {}
    for name in dict.fromkeys(weight_map.values()):
        if Path(name).name != name:
            raise ValueError(f"{index}: names the file {name!r} outside of its folder; fetch the index again.")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing, but {INDEX_FILE} names it; fetch this shard too.")
        shards[name] = read_header(folder / name)
    for key, name in weight_map.items():
        if key not in shards[name]:
            raise ValueError(f"{key}: {INDEX_FILE} puts it in {folder / name}, which lacks it; fetch both again.")
    tensors: dict[str, StoredTensor] = {}
    for name, shard in shards.items():
        if doubled := sorted(tensors.keys() & shard.keys()):
            other = tensors[doubled[0]].path.name
            raise ValueError(f"{doubled[0]}: both {other} and {name} in {folder} hold it; fetch the checkpoint again.")
        tensors |= shard
    return tensors


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        well_formed = all(isinstance(name, str) for name in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed or not weight_map:
        raise ValueError(f"{index}: damaged, it is not an index of shards; fetch this file again.")
    return weight_map


def _missing_weights(folder: Path) -> str:
    for path in (folder / SINGLE_FILE, folder / INDEX_FILE):
        if path.is_symlink() or path.exists():
            return f"{path}: is no file, or a link to one that is gone; fetch this file again."
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        return (
            f"{folder}: has {pickles[0]} and no {SINGLE_FILE}, and a pickle can run code; convert to safetensors "
            "first: load it with from_pretrained and save it with save_pretrained."
        )
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"{folder}: has {others[0]} but no {INDEX_FILE} that says what is where; fetch the index too."
    return f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}; give the folder of a checkpoint."
