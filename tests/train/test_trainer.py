"""Trainer on a preset: resumed runs repeat the whole ones bit for bit, and two processes train as one does."""

import json
import random
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.xdist_group("trainer")

STEPS = 6
SCRIPT = Path(__file__).parents[2] / "scripts" / "runs" / "trainer_first_contact.py"


@pytest.fixture(scope="module")
def contact() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture(scope="module")
def folder(contact: SimpleNamespace, tmp_path_factory) -> Path:
    """A small text of documents with a vocabulary of their own, tokenized."""
    folder = tmp_path_factory.mktemp("trainer")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 8))) for _ in range(300)]
    documents = [" ".join(generator.choices(words, k=200)) for _ in range(20)]
    text = folder / "text.txt"
    text.write_text("\n\n\n".join(documents))
    assert contact.prepare(str(text), folder, context=32, steps=STEPS) == contact.BATCH * STEPS
    return folder


@pytest.fixture(scope="module")
def results(contact: SimpleNamespace, folder: Path) -> dict[str, dict]:
    single = [name for name, run in contact.RUNS.items() if run["processes"] == 1]
    double = [name for name in contact.RUNS if name not in single]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SCRIPT.parents[2]))
        results = contact.launch(double, folder, STEPS)
    for name in single:
        result = contact.train(name, folder, STEPS)
        results[name] = json.loads(json.dumps(result))  # the keys as JSON makes them
    return results


@pytest.mark.parametrize("name", ["one process, resumed", "two processes, resumed"])
def test_resumed_run_is_identical(contact: SimpleNamespace, results: dict, name: str) -> None:
    whole = results[contact.RUNS[name]["resumes"]]
    late = {str(step) for step in range(STEPS // 2 + 1, STEPS + 1)}
    assert {step: whole["losses"][step] for step in late} == {step: results[name]["losses"][step] for step in late}
    assert results[name]["weights_sha256"] == whole["weights_sha256"]
    assert contact.compare(results, STEPS)["resumed_is_identical"][name]


@pytest.mark.parametrize("name", ["two processes", "checkpointed gradients"])
def test_same_losses_as_one_process(results: dict, name: str) -> None:
    reference = results["one process"]["losses"]
    assert results[name]["losses"] == pytest.approx(reference, abs=2e-5)
    assert reference[str(STEPS)] < reference["1"] - 0.05  # it learns, so that agreement means something


def test_comparison_notices_a_run_that_differs(contact: SimpleNamespace, results: dict) -> None:
    other = {**results["one process, resumed"], "weights_sha256": "0"}
    shown = contact.compare({**results, "one process, resumed": other}, STEPS)
    assert shown["resumed_is_identical"] == {"one process, resumed": False, "two processes, resumed": True}
