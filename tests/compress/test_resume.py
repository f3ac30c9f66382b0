"""Runs that end early and are started again: killed, out of disk, or met by another recipe, source or bad input."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_llmkernel import cli
from hf_llmkernel.checkpoint import output
from hf_llmkernel.compress import compress, disk, pipeline, run, sweep
from hf_llmkernel.convert import source

from .conftest import save_tiny

ROOT = Path(__file__).resolve().parents[2]
NAMES_CHANGE = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir")
STAGES = [
    {"drop_layers": {"count": 1, "metric": "block_influence"}},
    {"prune_ffn": {"ratio": 0.25, "align": 8, "method": "flap"}},
    {"factorize": {"ratio": 0.2, "align": 4, "allocation": "global", "include": ["*_proj"], "exclude": ["k_proj"]}},
    {"quantize": {"bits": 8, "group_size": 16}},
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Three small layers, of which one is dropped."""
    folder = tmp_path_factory.mktemp("dense")
    save_tiny(folder, hidden_size=16, intermediate_size=32)
    return folder


@pytest.fixture(scope="module")
def recipe(text):
    """Two decisions over all layers, two sweeps with data."""
    return {"calibration": {"source": str(text), "samples": 6, "length": 32}, "stages": STAGES}


@pytest.fixture(scope="module")
def whole(dense, recipe, tmp_path_factory):
    """What a run that nothing interrupts writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(dense, recipe, out, progress=False)
    return digests(out)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def pictures(out: Path, folder: Path) -> Iterator[dict[str, Path]]:
    """Copies of what is on the disk before names there change, which is what a kill at that moment leaves.

    `{change: copy}`; of changes that differ by numbers the first and the last one.
    """
    taken: dict[str, Path] = {}
    busy = False

    def watched(name: str, change):
        def take(path, *to, **options):
            nonlocal busy
            if not busy:
                busy = True
                names = " ".join(Path(entry).name for entry in (path, *to) if isinstance(entry, str | Path))
                kind = f"{name} {re.sub(r'[0-9]+', '0', names)}"
                moment = f"first {kind}" if f"first {kind}" not in taken else f"last {kind}"
                taken[moment] = copy_of(out, folder / moment)
                busy = False
            return change(path, *to, **options)

        return take

    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES_CHANGE:
            patch.setattr(os, name, watched(name, getattr(os, name)))
        yield taken


def copy_of(out: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in (out, out.with_name("out.part")):
        if path.exists():
            shutil.copytree(path, target / path.name)
    return target


def test_wherever_it_is_killed_the_same_call_ends_with_the_same_bytes(tmp_path, dense, recipe, whole):
    out = tmp_path / "run" / "out"
    out.parent.mkdir()
    with pictures(out, tmp_path) as taken:
        uninterrupted = compress(dense, recipe, out, progress=False)
    assert digests(out) == whole
    assert len(taken) >= 50
    for moment, picture in taken.items():
        result = compress(dense, recipe, picture / "out", progress=False)
        assert result.to_dict().keys() == uninterrupted.to_dict().keys() and result.stages == uninterrupted.stages
        assert {"survey"} <= result.seconds_by.keys() <= uninterrupted.seconds_by.keys(), moment
        assert digests(picture / "out") == whole, moment
        assert not (picture / "out.part").exists(), moment
        shutil.rmtree(picture)


KILLED = """
import os, signal, sys
import torch
from hf_llmkernel import cli
torch.cpu._is_avx512_bf16_supported = lambda: False  # as in the process that ends the run
from hf_llmkernel.checkpoint import output
replace = os.replace
def kill(source, target, **options):
    if str(target).endswith(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target, **options)
os.replace = kill
cli.main(["compress", *sys.argv[2:]])
"""


def test_a_command_that_was_killed_is_given_again(tmp_path, dense, recipe, whole, capfd):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    arguments = [str(dense), "--recipe", str(file), "--output", str(tmp_path / "out")]
    command = [sys.executable, "-c", KILLED, "sweep-01/layer-00000.json", *arguments]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -9
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.part" / "work" / "sweep-01" / "layer-00000.safetensors").is_file()
    assert cli.main(["compress", *arguments]) == 0
    assert digests(tmp_path / "out") == whole


class Stopped(Exception):
    """Ends a run as a fault of the program would: what it has made stays."""


def stop(*arguments, **options):
    raise Stopped


def interrupted(monkeypatch, module, name: str, dense, recipe, out, replacement=stop) -> None:
    """A run that ends when it calls `module.name`."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(module, name, replacement)
        compress(dense, recipe, out, progress=False)


def test_what_is_done_is_not_done_again(tmp_path, dense, recipe, whole, monkeypatch):
    interrupted(monkeypatch, pipeline, "_write_result", dense, recipe, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(sweep.Sweep, "run", stop)
        patch.setattr(run.Run, "_decide", stop)
        result = compress(dense, recipe, tmp_path / "out", progress=False)
    assert digests(tmp_path / "out") == whole
    uninterrupted = compress(dense, recipe, tmp_path / "again", progress=False)
    assert result.stages == uninterrupted.stages and len(result.stages) == len(STAGES)
    assert result.notes == uninterrupted.notes and result.notes
    assert result.weight_bytes == uninterrupted.weight_bytes


def test_what_is_half_removed_when_the_output_is_there_is_removed_and_the_run_tells(
    tmp_path, dense, recipe, whole, monkeypatch, capfd
):
    remove = shutil.rmtree

    def remove_a_part(path, **options):
        if path != tmp_path / "out" / "work":
            return remove(path, **options)
        for sweep_folder in path.glob("sweep-*"):
            remove(sweep_folder)
        raise Stopped

    interrupted(monkeypatch, output.shutil, "rmtree", dense, recipe, tmp_path / "out", remove_a_part)
    assert (tmp_path / "out" / "work" / "plan.json").is_file()
    with pytest.raises(ValueError, match="out: is complete, the run that wrote it was killed as it ended; remove"):
        output.check_output(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "output_folder", stop)
        result = compress(dense, recipe, tmp_path / "out")
    assert digests(tmp_path / "out") == whole and result.seconds > 0
    with pytest.raises(ValueError, match="out: exists and is not empty"):
        compress(dense, recipe, tmp_path / "out")


def test_the_seconds_of_all_attempts_count_and_the_second_says_that_it_goes_on(
    tmp_path, dense, recipe, monkeypatch, capfd
):
    interrupted(monkeypatch, pipeline, "_write_result", dense, recipe, tmp_path / "out")
    saved = json.loads((tmp_path / "out.part" / "work" / "seconds.json").read_text())
    assert "going on" not in capfd.readouterr().err
    result = compress(dense, recipe, tmp_path / "out")
    assert saved.keys() == result.seconds_by.keys() and 0 < sum(saved.values()) <= result.seconds + 0.05
    assert f"going on with the run that left {tmp_path / 'out.part'}" in capfd.readouterr().err


def test_a_run_that_goes_on_within_a_sweep_says_from_which_block(tmp_path, dense, recipe, monkeypatch, capfd):
    def stop_at_the_second(self, block):
        if block.index == 1:
            raise Stopped
        write(self, block)

    write = sweep.Sweep._write_block
    interrupted(monkeypatch, sweep.Sweep, "_write_block", dense, recipe, tmp_path / "out", stop_at_the_second)
    assert "going on" not in capfd.readouterr().err
    compress(dense, recipe, tmp_path / "out")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("going on from")]
    assert said == ["going on from block 2 of 2"]


def test_another_recipe_source_or_text_is_named_and_the_part_stays(tmp_path, dense, recipe, text, whole, monkeypatch):
    words = tmp_path / "words.txt"
    shutil.copy(text, words)
    recipe = {**recipe, "calibration": {**recipe["calibration"], "source": str(words)}}
    interrupted(monkeypatch, sweep, "write_json", dense, recipe, tmp_path / "out")
    before = digests(tmp_path / "out.part")
    save_tiny(tmp_path / "other", seed=1, hidden_size=16, intermediate_size=32)

    def refused(what: str, model, changed) -> None:
        message = f"out.part: holds an unfinished run of another {what}; give the same one to go on, or remove that"
        with pytest.raises(ValueError, match=message):
            compress(model, changed, tmp_path / "out", progress=False)
        assert digests(tmp_path / "out.part") == before

    refused("recipe", dense, {**recipe, "stages": STAGES[:-1]})
    refused("source", tmp_path / "other", recipe)
    written = words.stat()
    words.write_text(words.read_text() + " w1")
    refused("calibration text", dense, recipe)
    words.write_text(words.read_text().removesuffix(" w1"))
    os.utime(words, ns=(written.st_atime_ns, written.st_mtime_ns))
    compress(dense, recipe, tmp_path / "out", progress=False)
    names = set(whole) - {"recipe.yaml"}  # which names the text
    assert {name: digests(tmp_path / "out")[name] for name in names} == {name: whole[name] for name in names}


def test_a_part_in_which_nothing_is_finished_is_taken_over_whatever_it_was_of(
    tmp_path, dense, recipe, whole, monkeypatch, capfd
):
    def killed(self):
        shutil.copytree(tmp_path / "out.part", tmp_path / "left")
        raise Stopped

    other = {"stages": [{"quantize": {"bits": 4}}]}
    interrupted(monkeypatch, run.Run, "run", dense, other, tmp_path / "out", killed)
    assert not (tmp_path / "out.part").exists()
    (tmp_path / "left").rename(tmp_path / "out.part")
    assert (tmp_path / "out.part" / "work" / "run.json").is_file()
    compress(dense, recipe, tmp_path / "out")
    assert digests(tmp_path / "out") == whole
    assert "going on" not in capfd.readouterr().err


def test_source_recipe_and_texts_are_checked_before_anything_is_written(tmp_path, dense, recipe, monkeypatch):
    compress(dense, {"stages": [{"quantize": {"bits": 8}}]}, tmp_path / "int8", progress=False)
    for module, name in ((pipeline, "output_folder"), (pipeline, "convert_checkpoint")):
        monkeypatch.setattr(module, name, stop)
    monkeypatch.setattr(source, "_download", lambda *_: (_ for _ in ()).throw(ConnectionError("no Hub")))
    other = {"stages": [{"quantize": {"bits": 4}}]}
    no_text = {**recipe, "calibration": {"source": "/nowhere.txt", "length": 32}}
    for error, message, model, changed in (
        (ConnectionError, "no Hub", "no/model", recipe),
        (ValueError, "source=/no/model: is neither a folder", "/no/model", {"stages": "unreadable"}),
        (ValueError, "/nowhere.txt", dense, no_text),
        (ValueError, "layers=.0, 9. is beyond", dense, {"stages": [{"quantize": {"bits": 8, "layers": [0, 9]}}]}),
        (ValueError, "self_attn.q_proj is stored as int8, groups of 64", tmp_path / "int8", other),
    ):
        with pytest.raises(error, match=message):
            compress(model, changed, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="int8: exists and is not empty"):
        compress(dense, {"stages": "unreadable"}, tmp_path / "int8", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "layers.2.mlp.down_proj.weight: holds NaN"), (3e38, "layers.2: its outputs are not finite")],
)
def test_bad_input_in_the_last_layer_leaves_nothing(tmp_path, dense, recipe, value, message):
    damaged = Path(shutil.copytree(dense, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"].fill_(value)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        compress(damaged, recipe, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_full_disk_keeps_what_is_done(tmp_path, dense, recipe, whole, monkeypatch, capfd):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    arguments = ["compress", str(dense), "--recipe", str(file), "--output", str(tmp_path / "out")]
    save = disk.save_file

    def save_until_full(tensors, path, **options):
        if path.name == "layer-00001.part":
            raise SafetensorError(f"Error while serializing: I/O error: No space left on device ({disk.FULL_DISK})")
        save(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "save_file", save_until_full)
        assert cli.main(arguments) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search("layer-00001.safetensors: No space left on device; free space or choose another", errors[0])
    assert (tmp_path / "out.part" / "work" / "sweep-00" / "layer-00000.json").is_file()
    assert cli.main(arguments) == 0
    assert digests(tmp_path / "out") == whole


def test_other_faults_of_the_library_stay_what_they_are(tmp_path):
    with pytest.raises(SafetensorError):
        disk.write_tensors(tmp_path / "missing" / "file.safetensors", {"a": torch.zeros(2)})


def test_space_is_asked_for_what_is_still_to_be_written(tmp_path, dense, recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, "check_disk_space", lambda path, needed: asked.append(needed))
    interrupted(monkeypatch, pipeline, "_write_result", dense, recipe, tmp_path / "out")
    there = sum(path.stat().st_size for path in (tmp_path / "out.part").rglob("*") if path.is_file())
    compress(dense, recipe, tmp_path / "out", progress=False)
    assert there - 10_000 < asked[0] - asked[1] <= there
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    with pytest.raises(OSError, match="not enough disk space") as error:
        compress(dense, recipe, tmp_path / "full", progress=False)
    assert error.value.errno == errno.ENOSPC
