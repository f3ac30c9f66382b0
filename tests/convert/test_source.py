"""Hub ids: downloaded from a server on this machine, read from the cache offline, and every way not to be had."""

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hf_llmkernel.checkpoint import CheckpointReader
from hf_llmkernel.convert.source import companions, locate_source

from .sources import hashes, save_stock

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: the list of a repository's files, and each of them."""

    def __init__(self, folder: Path, asked: list[str], *arguments):
        self.folder, self.asked = folder, asked
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if not self.path.startswith(("/api/models/org/tiny/", "/org/tiny/")):
            return self.refuse("RepoNotFound")
        if "/v9" in self.path:
            return self.refuse("RevisionNotFound")
        if "/revision/" in self.path:
            files = [{"rfilename": name} for name in self.files()]
            return self.answer(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": files}).encode())
        if "/tree/" in self.path:
            tree = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in self.files().items()]
            return self.answer(json.dumps(tree).encode())
        path = self.folder / self.path.split("/", 5)[5]
        return self.answer(path.read_bytes()) if path.is_file() else self.refuse("EntryNotFound")

    do_HEAD = do_GET

    def files(self) -> dict[str, int]:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.stat().st_size for path in files}

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:x}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(tmp_path) -> Iterator[tuple[str, Path, list[str]]]:
    """Address, the one repository's folder, and what was asked for."""
    folder = tmp_path / "repository"
    save_stock(folder)
    (folder / "original").mkdir()
    for name in ("original/consolidated.00.pth", "original/tokenizer.model", "consolidated.safetensors", "model.onnx"):
        (folder / name).write_bytes(b"large")
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(HubHandler, folder, asked))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder, asked
    server.shutdown()
    server.server_close()
    thread.join()


CODE = "import sys; from hf_llmkernel.cli import main; sys.exit(main(sys.argv[1:]))"


def convert(tmp_path: Path, source: str, output: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", CODE, "convert", source, str(tmp_path / output)],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_hub_id_is_downloaded_once_and_found_offline(tmp_path, hub):
    address, folder, asked = hub
    ended = convert(tmp_path, "org/tiny", "output", HF_ENDPOINT=address)
    assert ended.returncode == 0, ended.stderr
    assert set(CheckpointReader(tmp_path / "output").keys()) == set(CheckpointReader(folder).keys())
    assert not [path for path in asked if "original" in path or "consolidated" in path or "onnx" in path]
    ended = convert(tmp_path, "org/tiny", "again", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert ended.returncode == 0, ended.stderr
    assert hashes(tmp_path / "again") == hashes(tmp_path / "output")


@pytest.fixture
def reached_from_here(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Makes downloads in this process go to an address, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def reach(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return reach


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("org/other", {}, "is no folder here, and the repository is not on the Hub, or is private; check the name"),
        ("org/other", {"gguf_file": "x.gguf"}, "is no folder here, and the repository is not on the Hub"),
        ("org/tiny", {"gguf_file": "x.gguf"}, "gguf_file=x.gguf is not in this repository; look at its files"),
        ("org/tiny", {"revision": "v9"}, "revision=v9 is not in this repository; look at its files"),
    ],
)
def test_what_the_hub_does_not_have(hub, reached_from_here, source, options, message):
    reached_from_here(hub[0])
    with pytest.raises(ValueError, match=f"^source={source}: {message}"):
        locate_source(source, **options)


def test_a_gguf_file_of_a_repository(hub, reached_from_here):
    address, folder, asked = hub
    (folder / "model.gguf").write_bytes(b"GGUF and more")
    reached_from_here(address)
    found = locate_source("org/tiny", gguf_file="model.gguf")
    assert found.gguf is not None and found.gguf.read_bytes() == b"GGUF and more"
    assert not [path for path in asked if "safetensors" in path]


def test_a_hub_that_cannot_be_reached(reached_from_here):
    reached_from_here("http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="^source=org/tiny: is no folder here, and the Hub cannot be reached"):
        locate_source("org/tiny")


def test_an_empty_cache_offline(reached_from_here, monkeypatch):
    reached_from_here("http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="not in the Hub cache, and HF_HUB_OFFLINE is set; unset it, or give a folder"):
        locate_source("org/tiny")


def test_a_folder_of_the_same_name_comes_first(tmp_path, monkeypatch):
    save_stock(tmp_path / "org/tiny")
    monkeypatch.chdir(tmp_path)
    assert locate_source("org/tiny").folder == Path("org/tiny")


def test_companions(tmp_path):
    wanted = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt", "vocab.json", "LICENSE"]
    wanted += ["chat_template.jinja", "additional_chat_templates/rag.jinja", "special_tokens_map.json"]
    others = ["config.json", "README.md", "model.safetensors", "tokenizer.py", "training.bin", "other/tokenizer.json"]
    for name in [*wanted, *others]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert companions(tmp_path) == sorted(map(Path, wanted))
