"""The build of the native library: what is current, what happens without a compiler, what a wheel is tagged."""

import platform

import pytest

from hf_llmkernel.kernels import build


@pytest.fixture
def hook(tmp_path):
    return build.NativeLibraryHook(str(build.FOLDER.parents[1]), {}, None, None, str(tmp_path), "wheel")


def test_the_library_is_of_the_present_sources():
    assert build.is_current()
    wheel = {"artifacts": []}
    build.NativeLibraryHook(str(build.FOLDER.parents[1]), {}, None, None, "", "wheel").initialize("standard", wheel)
    assert wheel["artifacts"] == ["/hf_llmkernel/kernels/libllmkernel.so"]
    assert not wheel["pure_python"]
    assert wheel["tag"].startswith("py3-none-") and wheel["tag"].endswith(platform.machine())


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"])
def test_without_a_compiler_the_build_succeeds_and_says_so(hook, tmp_path, monkeypatch, capsys, compiler):
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "libllmkernel.so")
    monkeypatch.setenv("CXX", compiler)
    wheel = {"artifacts": []}
    hook.initialize("standard", wheel)
    assert wheel == {"artifacts": []}  # a pure wheel
    said = capsys.readouterr().err
    assert "built without native kernels" in said and compiler in said
    assert not list(tmp_path.iterdir())


def test_changed_sources_are_seen(tmp_path, monkeypatch):
    before = build.sources_hash()
    for path in build.SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.sources_hash() == before
    (tmp_path / "matrix.h").write_text("// changed")
    assert build.sources_hash() != before
    assert not build.is_current()
