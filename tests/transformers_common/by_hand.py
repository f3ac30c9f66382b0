"""Runs transformers' own `CausalLMModelTest` on this family and on stock Llama: `scripts/runs/transformers_suite.sh`.

Reading order: a `tests` package is put together -> tiny models for its pipeline tests -> one run a suite -> counts,
and what a suite skips where stock Llama is tested. It ends with 1 where anything failed.

The source distribution of transformers lacks the generation and pipeline tests, so they come from a copy of its
repository (a checkout or a git directory), which may be of another version; where both have a file, the distribution's
is taken, for it is that of the installed version. Nothing of either stays in this project.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions

from . import model_testers
from .library import distributed_folder

FOLDER = Path(__file__).parent
FROM_REPOSITORY = (
    "tests/__init__.py",
    "tests/causal_lm_tester.py",
    "tests/exporters",
    "tests/generation",
    "tests/pipelines",
    "tests/utils",
    "utils/test_module",
)
SUITES = {
    "Llama": model_testers.LlamaTester,
    "Homogeneous": model_testers.LLMKernelTester,
    "Shapes": model_testers.ShapesTester,
    "Skips": model_testers.SkipsTester,
    "Packed": model_testers.PackedTester,
    "PackedEmbedding": model_testers.PackedEmbeddingTester,
}
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("repository", type=Path, help="a checkout of transformers, or its git directory")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="write each suite's whole output into this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        put_together(arguments.repository, folder)
        outputs = {name: run_suite(name, folder, arguments.workers, arguments.keep) for name in arguments.suite}
    suites = {name: {**counts(output), **skips_beyond_llama(output, outputs)} for name, output in outputs.items()}
    print(json.dumps({**description(arguments.repository), "suites": suites}, indent=2))
    sys.exit(any(suite["failed"] for suite in suites.values()))


def put_together(repository: Path, folder: Path) -> None:
    """Writes the `tests` package into `folder`: the repository's files, over them the distribution's, and ours."""
    copy_of_repository(repository, folder)
    for file in (folder / "tests").rglob("*.py"):  # the older files import the client that httpx2 has replaced
        file.write_text(file.read_text().replace("import httpx\n", "import httpx2 as httpx\n"))
    for file in distributed_folder().glob("*.py"):
        shutil.copy(file, folder / "tests")
    shutil.copy(FOLDER / "library" / "distributed_testing_utils.py", folder / "tests")
    shutil.copy(FOLDER / "by_hand_suites.py", folder / "tests" / "test_by_hand.py")
    # The pipeline tests look for the library's source beside them, to find its version.
    (folder / "src" / "transformers").mkdir(parents=True)
    (folder / "src" / "transformers" / "__init__.py").touch()


def copy_of_repository(repository: Path, folder: Path) -> None:
    if not (repository / "tests").is_dir():
        command = ["git", f"--git-dir={repository}", "archive", "HEAD", *FROM_REPOSITORY]
        archive = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as opened:
            opened.extractall(folder, filter="data")
        return
    for name in FROM_REPOSITORY:
        source, target = repository / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def save_tiny_models(tester: model_testers.LLMKernelTester, folder: Path) -> None:
    """Saves what the library keeps on the Hub for its pipeline tests: a model of every class, and a tokenizer."""
    tokenizer = tiny_tokenizer(tester.vocab_size)
    for model_class in tester.model_classes:
        target = folder / tester.config_class.model_type / model_class.__name__
        model_class(tester.get_config()).save_pretrained(target)
        tokenizer.save_pretrained(target)
    entry = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
    (folder / "reports").mkdir()
    summary = {model_class.__name__: entry for model_class in tester.model_classes}
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))


def tiny_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([__doc__], trainer)
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def run_suite(name: str, folder: Path, workers: int, keep: Path | None) -> str:
    """Runs one suite's class in a process of its own; returns what pytest printed."""
    tiny = folder / "tiny" / name
    tiny.mkdir(parents=True)
    save_tiny_models(SUITES[name](), tiny)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parents[1])]),
        "TRANSFORMERS_TINY_MODEL_PATH": str(tiny),
        "TRANSFORMERS_SUITE_SEED": str(SEED),
    }
    command = [sys.executable, "-m", "pytest", f"tests/test_by_hand.py::{name}Test", "-n", str(workers)]
    print(f"{name}: running", file=sys.stderr)
    # A rank that fails alone leaves the others waiting.
    command += ["-q", "-rfEs", "--timeout", "600"]
    run = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name}.txt").write_text(run.stdout)
    return run.stdout


def counts(output: str) -> dict[str, int | float | list[str]]:
    """Numbers of pytest's last line, as in `167 passed, 139 skipped, 1217 subtests passed in 180.00s`, and failures."""
    found = {kind: int(number) for number, kind in re.findall(r"(\d+) ([a-z ]+?)s?(?=,| in )", output.splitlines()[-1])}
    failures = sorted(set(re.findall(r"^(?:SUB)?(?:FAILED|ERROR).*::(test_\w+)", output, re.MULTILINE)))
    failed = found.get("failed", 0) + found.get("error", 0) + found.get("subtests failed", 0)
    return {
        "passed": found.get("passed", 0),
        "failed": failed,
        "skipped": found.get("skipped", 0),
        "failures": failures,
        "seconds": float(re.findall(r" in ([\d.]+)s", output.splitlines()[-1])[0]),
    }


def skips_beyond_llama(output: str, outputs: dict[str, str]) -> dict[str, list[str]]:
    """Reasons of what is skipped where stock Llama is tested: a family that lost a feature would lose tests unseen."""
    if "Llama" not in outputs:
        return {}
    ours, llamas = skips(output), skips(outputs["Llama"])
    beyond = [reason for place, reasons in ours.items() for reason in reasons[len(llamas.get(place, [])) :]]
    return {"skipped_beyond_llama": sorted(beyond)}


def skips(output: str) -> dict[str, list[str]]:
    """Reasons for skipping by the line of the library that skips, from `SKIPPED [2] tests/test_x.py:12: reason`."""
    found: dict[str, list[str]] = {}
    for times, place, reason in re.findall(r"^SKIPPED \[(\d+)\] (\S+:\d+): (.+)$", output, re.MULTILINE):
        found.setdefault(place, []).extend([reason] * int(times))
    return found


def description(repository: Path) -> dict[str, object]:
    """What is needed to run this again: the seed, the machine, the versions, this project's commit."""
    source = (repository / "setup.py").read_text() if (repository / "setup.py").is_file() else git_file(repository)
    match = re.search(r'version="([^"]+)"', source)
    versions = {**describe_versions(), **{package: version(package) for package in ("accelerate", "peft", "pytest")}}
    return {
        "seed": SEED,
        "machine": describe_machine(),
        "versions": {**versions, "repository of transformers": match[1] if match else None},
        "commit": describe_commit(FOLDER),
    }


def git_file(repository: Path) -> str:
    command = ["git", f"--git-dir={repository}", "show", "HEAD:setup.py"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
