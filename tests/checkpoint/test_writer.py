"""Writing: what the safetensors library reads back, in files of standard names and exact sizes."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_llmkernel.checkpoint import CheckpointReader, CheckpointWriter, writer
from hf_llmkernel.checkpoint.header import DTYPES, read_header

from .test_reader import every_dtype, same_bytes


def write(folder: Path, tensors: dict[str, torch.Tensor], **options: int) -> list[str]:
    with CheckpointWriter(folder, **options) as checkpoint:
        for name, tensor in tensors.items():
            checkpoint.add(name, tensor)
    return sorted(path.name for path in folder.iterdir())


def test_the_library_reads_it_back(tmp_path):
    tensors = every_dtype()
    assert write(tmp_path, tensors) == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_bytes(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("copied_below", [0, 1 << 60])
def test_every_tensor_is_aligned_and_nothing_else_is_stored(tmp_path, monkeypatch, copied_below):
    monkeypatch.setattr(writer, "COPIED_BELOW", copied_below)
    kinds = [(name, dtype, count) for count in (1, 3, 8, 5) for name, dtype in DTYPES.items()]
    tensors = {f"{name}.{count}": torch.ones(count).to(dtype) for name, dtype, count in kinds}
    write(tmp_path, tensors)
    for name, stored in read_header(tmp_path / "model.safetensors").items():
        assert stored.offset % stored.dtype.itemsize == 0, name
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(same_bytes(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_small_file_is_as_small_as_the_librarys(tmp_path):
    tensors = {"x": torch.randn(30, 30), "y": torch.ones(7)}
    write(tmp_path, tensors)
    save_file(tensors, tmp_path / "reference.safetensors", metadata={"format": "pt"})
    ours, reference = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("model", "reference"))
    assert abs(ours - reference) <= 8


def test_a_header_larger_than_its_room(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "COPIED_BELOW", 0)
    monkeypatch.setattr(writer, "HEADER_ROOM", 64)
    tensors = {f"tensor.{index}": torch.full((4,), float(index)) for index in range(50)}
    write(tmp_path, tensors)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(same_bytes(loaded[name], tensor) for name, tensor in tensors.items())


def test_views_that_are_not_contiguous(tmp_path):
    tensor = torch.arange(12.0).view(3, 4)
    write(tmp_path, {"t": tensor.t(), "column": tensor[:, 1], "gradient": torch.ones(2, requires_grad=True)})
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.tensor("t"), tensor.t()) and torch.equal(reader.tensor("column"), tensor[:, 1])


def test_shards_and_their_index(tmp_path):
    tensors = {f"x{index}": torch.full((25,), float(index)) for index in range(7)}  # 100 bytes each
    names = write(tmp_path, tensors, shard_bytes=250)
    files = [f"model-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert names == [*files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"] == {"total_size": 700}
    assert index["weight_map"] == {f"x{number}": files[number // 2] for number in range(7)}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    names = write(tmp_path, {"a": torch.ones(2), "b": torch.ones(100), "c": torch.ones(2)}, shard_bytes=50)
    assert len(names) == 4


def test_a_tensor_in_pieces_of_any_shape(tmp_path):
    tensor = torch.randn(5, 6)
    with CheckpointWriter(tmp_path) as checkpoint:
        checkpoint.add_blocks("x", tensor.dtype, (5, 6), (row for row in tensor))
    assert torch.equal(CheckpointReader(tmp_path).tensor("x"), tensor)


def test_no_tensors_are_one_empty_file(tmp_path):
    assert write(tmp_path, {}) == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors") == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.add("x", torch.ones(2)), "^x: written twice into .*; give every tensor one name"),
        (lambda c: c.add("y", torch.ones(2, dtype=torch.complex128)), "^y: safetensors has no torch.complex128"),
        (lambda c: c.add_blocks("y", torch.float32, (3,), [torch.ones(2)]), r"^y: 8 bytes given for .*which takes 12"),
        (lambda c: c.add_blocks("y", torch.float32, (2,), [torch.ones(2).half()]), "^y: a piece of torch.float16 in"),
    ],
)
def test_misuse_leaves_nothing(tmp_path, call, message):
    with pytest.raises(ValueError, match=message), CheckpointWriter(tmp_path) as checkpoint:
        checkpoint.add("x", torch.ones(2))
        call(checkpoint)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, {"x": torch.ones(1000), "odd": torch.ones(3)}, shard_bytes=100)
    assert not list(tmp_path.iterdir())


def test_shard_bytes_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="shard_bytes=0: must be at least 1"):
        CheckpointWriter(tmp_path, shard_bytes=0)
