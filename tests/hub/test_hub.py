"""Pushed compressed, loaded by name where the package is not installed: same logits, same text, same files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_llmkernel.model.configuration_llm_kernel import AUTO_MAP, PAYLOAD_FILES
from tests.hub.loopback_hub import LoopbackHub
from tests.hub.push_worker import REPOSITORIES, build_tokenizer

pytestmark = pytest.mark.xdist_group("hub")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(arguments: list[str], environment: dict[str, str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    finished = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=180
    )
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def traffic(tmp_path_factory) -> dict:
    """`{"pushed", "loaded", "repositories", "requests"}` of one push and one load."""
    workspace = tmp_path_factory.mktemp("hub")
    site_packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    job = {"site_packages": site_packages, "output": f"{workspace}/loaded.pt", "saved": f"{workspace}/saved"}
    (workspace / "job.json").write_text(json.dumps(job))
    with LoopbackHub() as hub:
        run([str(HERE / "push_worker.py"), f"{workspace}/pushed.pt"], hub.environment(workspace / "pusher"))
        run(["-I", "-S", str(HERE / "load_worker.py"), f"{workspace}/job.json"], hub.environment(workspace / "loader"))
        return {
            "pushed": torch.load(workspace / "pushed.pt"),
            "loaded": torch.load(workspace / "loaded.pt"),
            "repositories": {name: dict(repository.files) for name, repository in hub.repositories.items()},
            "requests": hub.requests,
        }


def equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    assert len(expected) >= 1 and all(tensor.std() > 0 for tensor in expected)
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_same_logits_without_the_package(traffic: dict, repository: str) -> None:
    assert equal(traffic["loaded"]["outputs"][repository], traffic["pushed"]["outputs"][repository])


def test_remote_code_is_what_ran(traffic: dict) -> None:
    assert all(module.startswith("transformers_modules.loopback.") for module in traffic["loaded"]["modules"])


def test_pipeline_continues_with_the_same_tokens(traffic: dict) -> None:
    assert traffic["loaded"]["continued"] == traffic["pushed"]["continued"]
    assert len(traffic["loaded"]["continued"]) > len(build_tokenizer()("the quick")["input_ids"])


def test_tokenizer_came_along(traffic: dict) -> None:
    assert traffic["loaded"]["tokens"] == build_tokenizer()("the lazy dog")["input_ids"]


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_repository_is_a_full_payload(traffic: dict, repository: str) -> None:
    files = traffic["repositories"][repository]
    assert {*PAYLOAD_FILES, "config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    assert any(request.startswith("POST") and repository in request for request in traffic["requests"])


def test_saved_by_remote_code_computes_the_same(traffic: dict) -> None:
    expected = {REPOSITORIES[name].__name__: tensors for name, tensors in traffic["pushed"]["outputs"].items()}
    for folder, outputs in traffic["loaded"]["saved"].items():
        config = json.loads((Path(folder) / "config.json").read_text())
        assert equal(outputs, expected[config["architectures"][0]]), folder


def test_saved_by_remote_code_is_a_full_payload(traffic: dict) -> None:
    pushed = traffic["repositories"]["loopback/causal"]
    for folder in map(Path, [*traffic["loaded"]["saved"], traffic["loaded"]["config"]]):
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        for name in PAYLOAD_FILES:
            assert (folder / name).read_bytes() == pushed[name], f"{folder}/{name}"
