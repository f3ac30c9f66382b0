"""Output folders appear whole or not at all."""

import errno
import shutil
import subprocess
import sys

import pytest

from hf_llmkernel.checkpoint import check_disk_space, check_output, output_folder, part_folder


def test_appears_only_when_done(tmp_path):
    target = tmp_path / "deep/output"
    with output_folder(target) as folder:
        assert folder == part_folder(target) and folder.parent == target.parent
        (folder / "file").write_text("content")
        (folder / "sub").mkdir()
        assert not target.exists()
    assert sorted(path.name for path in target.iterdir()) == ["file", "sub"]
    assert [path.name for path in target.parent.iterdir()] == ["output"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_disappears_on_an_error(tmp_path, error):
    with pytest.raises(error), output_folder(tmp_path / "output") as folder:
        (folder / "file").write_text("content")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(OSError, match="No space left on device: .*output.part"), output_folder(tmp_path / "output"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"input/output$"), output_folder(tmp_path / "output"):
        raise OSError(errno.EIO, "input/output")


def test_a_file_above_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output=.*file/deep/output: .*/file is a file, not a folder; choose another"):
        check_output(tmp_path / "file/deep/output")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with output_folder("~/output") as folder:
        assert folder == part_folder("~/output") == tmp_path / "output.part"
    with pytest.raises(ValueError, match="is not a folder"):
        (tmp_path / "file").touch()
        check_output("~/file")
    assert (tmp_path / "output").is_dir()


def test_replaces_an_empty_folder(tmp_path):
    (tmp_path / "output").mkdir()
    with output_folder(tmp_path / "output") as folder:
        (folder / "file").touch()
    assert (tmp_path / "output/file").exists()


def test_what_is_in_the_way_stays(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "other.part").mkdir()
    (tmp_path / "other.part/theirs").touch()
    for name, message in (
        ("full", "output=.*full: exists and is not empty; choose another folder or remove it"),
        ("file", "output=.*file: exists and is not a folder; choose"),
        ("link", "output=.*link: exists and is not a folder; choose"),
        ("other", "output=.*other: .*other.part is in the way and was not made by this program; remove or rename"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output(tmp_path / name)
        with pytest.raises(ValueError, match=message), output_folder(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "link", "mine", "other.part", "theirs"]


def test_an_empty_unfinished_folder_is_taken(tmp_path):
    (tmp_path / "output.part").mkdir()  # of a run that ended before it could mark it
    with output_folder(tmp_path / "output") as folder:
        (folder / "file").touch()
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["file"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="exists and is not empty"), output_folder(tmp_path / "output"):
        (tmp_path / "output").mkdir()
        (tmp_path / "output/theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["output", "theirs"]


KILLED = """
import os, signal, sys
from hf_llmkernel.checkpoint import output_folder
with output_folder(sys.argv[1], resume=True) as folder:
    (folder / "half").write_text("written")
    (folder / "sub").mkdir(exist_ok=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_remains_of_a_killed_run_are_cleared_or_resumed(tmp_path):
    target = tmp_path / "output"
    subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["output.part"]
    with output_folder(target, resume=True) as folder:
        assert (folder / "half").read_text() == "written"
    shutil.rmtree(target)
    subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    with output_folder(target) as folder:
        assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == []
    assert [path.name for path in tmp_path.rglob("*")] == ["output"]


def test_a_resumable_run_keeps_its_part_on_an_error(tmp_path):
    with pytest.raises(RuntimeError), output_folder(tmp_path / "output", resume=True) as folder:
        (folder / "half").touch()
        raise RuntimeError
    with output_folder(tmp_path / "output", resume=True) as folder:
        assert (folder / "half").exists()


def test_two_writers_at_once(tmp_path):
    with output_folder(tmp_path / "output") as folder:
        (folder / "file").touch()
        with pytest.raises(ValueError, match="another process is writing there"), output_folder(tmp_path / "output"):
            pass
        assert (folder / "file").exists()
    assert (tmp_path / "output/file").exists()


def test_disk_space(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_disk_space(tmp_path / "not/yet/there", 1)
    with pytest.raises(OSError, match=r"not enough disk space: \d+\.\d\d GB needed, \d+\.\d\d GB free") as raised:
        check_disk_space(tmp_path / "not/yet/there", 2 * free)
    assert raised.value.errno == errno.ENOSPC
