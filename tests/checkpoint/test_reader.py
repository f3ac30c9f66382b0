"""Reading: equal to the safetensors library, bounded memory, and every fault of a file by its name."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_llmkernel.checkpoint import CheckpointReader, is_finite
from hf_llmkernel.checkpoint.header import DTYPES, read_header


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    as_bytes = [tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(*as_bytes)


def every_dtype() -> dict[str, torch.Tensor]:
    numbers = torch.arange(15).view(3, 5)
    return {name: numbers.to(dtype) for name, dtype in DTYPES.items()} | {
        "scalar": torch.tensor(3.5),
        "empty": torch.ones(0, 7),
    }


def test_reads_what_the_library_wrote(tmp_path):
    tensors = every_dtype()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader = CheckpointReader(tmp_path)
    assert set(reader.keys()) == set(tensors)
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
        assert name in reader and "other" not in reader
        assert same_bytes(reader.tensor(name), tensor)
        assert reader.file(name) == tmp_path / "model.safetensors"


def test_pieces_are_consecutive_and_bounded(tmp_path):
    tensor = torch.randn(7, 13)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    pieces = list(CheckpointReader(tmp_path).blocks("x", block_bytes=50))
    assert all(piece.nbytes <= 50 for piece in pieces) and len(pieces) == 8
    assert torch.equal(torch.cat(pieces), tensor.flatten())


def test_a_tensor_has_memory_of_its_own(tmp_path):
    save_file({"x": torch.zeros(4)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    reader.tensor("x").fill_(7)
    assert torch.equal(reader.tensor("x"), torch.zeros(4))


def test_shards_by_their_index(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"c": torch.ones(3)}, tmp_path / "consolidated.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    reader = CheckpointReader(tmp_path)
    assert reader.keys() == ["a", "b"]
    assert torch.equal(reader.tensor("b"), torch.ones(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_values_that_are_not_finite(tmp_path, dtype, value):
    tensor = torch.ones(100)
    tensor[63] = value
    save_file({"layer.x": tensor.to(dtype)}, tmp_path / "model.safetensors")
    kind = "NaN" if value != value else "an infinity"
    with pytest.raises(ValueError, match=rf"layer\.x: holds {kind} in .*model\.safetensors; the file is damaged"):
        CheckpointReader(tmp_path).tensor("layer.x")
    with pytest.raises(ValueError, match=r"layer\.x: holds"):
        list(CheckpointReader(tmp_path).blocks("layer.x", 32))
    assert same_bytes(CheckpointReader(tmp_path, check_finite=False).tensor("layer.x"), tensor.to(dtype))


def test_finite_extremes_are_finite():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert is_finite(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype))
    assert is_finite(torch.ones(0)) and is_finite(torch.tensor([1, 2]))


def test_a_key_that_is_not_there(tmp_path):
    save_file({"x": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^y: not in the checkpoint .*; "):
        CheckpointReader(tmp_path).tensor("y")


def header_of(entry: object, length: int | None = None, data: int = 16) -> bytes:
    text = entry if isinstance(entry, bytes) else json.dumps({"x": entry}).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
DAMAGED = {
    "too short for a length": b"abc",
    "a length beyond the file": header_of(F32, length=10**6),
    "a length beyond reason": header_of(F32, length=2**63),
    "not JSON": header_of(b"{x"),
    "not UTF-8": header_of(b'{"\xff": 1}'),
    "a list": header_of(b"[1, 2]"),
    "a name twice": header_of(b'{"x": 1, "x": 2}'),
    "no entry": header_of(7),
    "no shape": header_of({"dtype": "F32", "data_offsets": [0, 16]}),
    "negative shape": header_of({**F32, "shape": [-4]}),
    "fractional shape": header_of({**F32, "shape": [4.0]}),
    "one offset": header_of({**F32, "data_offsets": [16]}),
    "unknown dtype": header_of({**F32, "dtype": "F4"}),
    "a shape that does not fill its bytes": header_of({**F32, "shape": [3]}),
    "a gap": header_of({**F32, "data_offsets": [8, 24]}, data=24),
    "truncated": header_of(F32, data=15),
    "too long": header_of(F32, data=17),
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 16\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(ValueError, match=rf"^{path}: .*; \w+ .*\.$") as raised:
        CheckpointReader(tmp_path)
    assert "\n" not in str(raised.value)


def test_overlapping_tensors(tmp_path):
    starts = {"a": 0, "b": 4}
    table = {name: {"dtype": "U8", "shape": [6], "data_offsets": [at, at + 6]} for name, at in starts.items()}
    (tmp_path / "model.safetensors").write_bytes(header_of(json.dumps(table).encode(), data=10))
    with pytest.raises(ValueError, match="b leaves a gap or overlaps"):
        CheckpointReader(tmp_path)


def test_a_file_cut_after_it_was_opened(tmp_path):
    save_file({"x": torch.zeros(1000)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 2000)
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated, it ends before byte"):
        reader.tensor("x")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"pickle")
    with pytest.raises(ValueError, match=rf"has {name} and no model\.safetensors, .*convert to safetensors first"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_link_to_a_file_that_is_gone(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=rf"/{name}: is no file, or a link to one that is gone; fetch"):
        CheckpointReader(tmp_path)


def test_a_folder_that_is_not_there():
    with pytest.raises(ValueError, match="no/such: has neither"):
        CheckpointReader(Path("no/such"))


def test_headers_padded_with_blanks(tmp_path):
    text = json.dumps({"__metadata__": {"format": "pt"}, "x": F32}).encode() + b" " * 1000
    (tmp_path / "model.safetensors").write_bytes(header_of(text))
    assert read_header(tmp_path / "model.safetensors")["x"].offset == 8 + len(text)
