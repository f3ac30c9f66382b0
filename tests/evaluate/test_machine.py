"""What a report says of the machine, the versions and the commit."""

import json
import os
import subprocess

import psutil
import pytest
import torch

from hf_llmkernel.evaluate import machine
from hf_llmkernel.evaluate.machine import available_bytes, describe_commit, describe_machine, describe_versions


def git(folder, *arguments) -> str:
    author = ["-c", "user.name=Name", "-c", "user.email=name@example.com", "-c", "commit.gpgsign=false"]
    ended = subprocess.run(["git", *author, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return ended.stdout.strip()


@pytest.fixture
def work_tree(tmp_path):
    """A repository of one commit, with a tag and a file in a folder."""
    folder = tmp_path / "tree"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("one")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "one")
    git(folder, "tag", "--annotate", "v1", "--message", "one")
    return folder


def test_the_commit_is_named_in_full_whatever_the_tags(work_tree):
    commit = git(work_tree, "rev-parse", "HEAD")
    assert len(commit) == 40
    assert describe_commit(work_tree) == describe_commit(work_tree / "inner") == commit


def test_a_changed_file_is_told_and_a_new_one_is_not(work_tree):
    commit = git(work_tree, "rev-parse", "HEAD")
    (work_tree / "new").write_text("not of the commit")
    assert describe_commit(work_tree) == commit
    (work_tree / "inner" / "file").write_text("two")
    assert describe_commit(work_tree) == f"{commit}-dirty"


def test_without_a_work_tree_or_git_there_is_no_commit(work_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_commit(work_tree) is None


def test_the_machine_is_described_in_json_without_names():
    described = json.loads(json.dumps({**describe_machine(), **describe_versions()}))
    assert described["cores"] == os.cpu_count() and described["threads"] == torch.get_num_threads()
    assert described["memory_bytes"] == psutil.virtual_memory().total
    assert described["torch"] == torch.__version__
    assert os.uname().nodename not in json.dumps(described).split('"')


def test_available_memory_is_below_the_total():
    assert 0 < available_bytes() <= psutil.virtual_memory().total
    assert machine.describe_machine()["cpu"]
