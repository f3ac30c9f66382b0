"""Where a model comes from: a folder, or the Hub's client, which is replaced by a stand-in."""

import huggingface_hub
import pytest

from hf_llmkernel.evaluate import inspect
from hf_llmkernel.evaluate.source import model_folder, read_config


def test_a_folder_is_itself(saved):
    assert model_folder(saved / "llama") == saved / "llama"
    assert read_config(saved / "llama")["model_type"] == "llama"


def test_a_hub_name_is_fetched_with_what_a_model_needs(saved, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(saved / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert inspect("org/tiny").entries == inspect(saved / "llama").entries
    ((name, patterns),) = asked
    assert name == "org/tiny" and {"*.safetensors", "*.json", "*.py"} <= set(patterns)


def test_a_repository_that_cannot_be_had_is_one_line(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise OSError("404 Client Error.\nRequest ID: 1")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"model='org/tiny': is neither .*\(404 Client Error\.\); check") as error:
        model_folder("org/tiny")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["./org/tiny", "/org", "tiny", "a/b/c"])
def test_paths_that_are_no_folders_do_not_reach_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match="is no folder of a checkpoint"):
        model_folder(name)


def test_a_config_that_is_no_object(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: is no JSON object"):
        read_config(tmp_path)
