"""The model card: every place of the template is filled from files and report, and what it says can be run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_llmkernel.evaluate import Report
from hf_llmkernel.model import modeling_llm_kernel as modeling
from hf_llmkernel.publish import write_model_card
from hf_llmkernel.publish.card import read_template
from tests.hub.push_worker import build_tokenizer, compressed_config

BASELINE = Report(
    model="dense",
    parameters=134_515_008,
    dense_parameters=134_515_008,
    bytes_on_disk=269_060_552,
    perplexity=17.25,
    context_length=1024,
    tokens_evaluated=8192,
    text="bbc",
    dtype="bfloat16",
    decode_tokens_per_second=20.5,
)
REPORT = replace(
    BASELINE,
    model="compressed",
    parameters=120_000_000,
    bytes_on_disk=163_400_000,
    perplexity=18.5,
    perplexity_standard_error=0.75,
    baseline_perplexity=17.25,
    decode_tokens_per_second=21.25,
    prefill_tokens_per_second=None,
    peak_memory_bytes=912_345_678,
    sample={"prompt": "Why is the sky blue?", "text": "Because of $cattering.\nIndeed.", "chat": True},
    settings={"repeats": 5, "prefill_tokens": 512},
    machine={"cpu": "A processor", "threads": 2},
    versions={"torch": "2.13.0"},
    reasons={"prefill_tokens_per_second": "the model does not fit the memory limit"},
    baseline=BASELINE,
)


def save(folder: Path, model_class: type = modeling.LLMKernelForCausalLM) -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model_class(compressed_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "small-model")


def sections(card: Path) -> dict[str, str]:
    _, _, body = card.read_text().split("---\n", 2)
    parts = re.split(r"^## (.+)$", body, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_metadata_is_what_the_hub_reads(folder: Path) -> None:
    card = write_model_card(folder, REPORT.to_dict(), "HuggingFaceTB/SmolLM2-135M", license="apache-2.0")
    data = ModelCard.load(card).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert {"llm_kernel", "custom_code"} <= set(data.tags)


def test_figures_stand_beside_the_baseline(folder: Path) -> None:
    measured = sections(write_model_card(folder, REPORT.to_dict()))["What was measured"]
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in measured.splitlines() if line.startswith("| ")}
    assert rows["| "] == ["dense", "compressed |"]
    assert rows["| parameters stored"] == ["134,515,008", "120,000,000 |"]
    assert rows["| bytes on disk"] == ["269.1 MB", "163.4 MB |"]
    assert rows["| perplexity (8,192 tokens of bbc, context 1024)"] == ["17.25", "18.50 ± 0.75 |"]
    assert rows["| decode, tokens/s (bfloat16)"] == ["20.50", "21.25 |"]
    assert "> Because of $cattering.\n> Indeed." in measured


def test_what_was_not_measured_says_why(folder: Path) -> None:
    measured = sections(write_model_card(folder, REPORT.to_dict()))["What was measured"]
    assert "not measured: the model does not fit the memory limit" in measured
    without = sections(write_model_card(folder, None))
    assert without["What was measured"].count("not measured: no report was made for this model") == 6
    assert "Not measured" in without["How it was measured"]


@pytest.mark.parametrize("report", [None, REPORT.to_dict(), BASELINE.to_dict()])
@pytest.mark.parametrize("base", [None, "org/name", "/some/where/local-model"])
def test_no_place_is_left_open(folder: Path, report: dict | None, base: str | None) -> None:
    text = write_model_card(folder, report, base).read_text().replace("$cattering", "")
    assert "$" not in text and "None" not in text and "/some/where" not in text
    headings = re.findall(r"^## .+$", read_template(), flags=re.MULTILINE)
    assert len(headings) == 7 and all(heading in text for heading in headings)


def test_forms_are_counted_from_the_weight_files(folder: Path) -> None:
    stored = sections(write_model_card(folder, None))["What is stored"]
    rows = [line.strip("| ").split(" | ") for line in stored.splitlines() if line.startswith("| ")][2:]
    forms = {row[0] for row in rows}
    assert {"int8 per row", "2:4 float32", "bitmask int8 per row", "int4 g16"} <= forms
    assert any(form.startswith("rank 6 (int8 per row, 2:4 int4 g4") for form in forms)
    tensors = load_file(folder / "model.safetensors")
    sizes = {row[0]: row[-1] for row in rows}
    embedding = sum(tensor.nbytes for name, tensor in tensors.items() if "embed_tokens" in name)
    assert sizes["int4 g16"] == f"{embedding:,} bytes"
    assert f"{(folder / 'model.safetensors').stat().st_size:,} bytes" in stored


def test_recipe_is_quoted(folder: Path) -> None:
    assert "No recipe lies beside the weights" in sections(write_model_card(folder, None))["How it was made"]
    (folder / "recipe.yaml").write_text("stages:\n- quantize: {bits: 8}\n")
    made = sections(write_model_card(folder, None))["How it was made"]
    assert "```yaml\nstages:\n- quantize: {bits: 8}\n```" in made


@pytest.mark.parametrize(
    ("model_class", "task"),
    [
        (modeling.LLMKernelModel, "feature-extraction"),
        (modeling.LLMKernelForSequenceClassification, "text-classification"),
        (modeling.LLMKernelForTokenClassification, "token-classification"),
        (modeling.LLMKernelForQuestionAnswering, "question-answering"),
    ],
)
def test_every_class_has_its_task(tmp_path: Path, model_class: type, task: str) -> None:
    card = write_model_card(save(tmp_path / "model", model_class), None)
    assert ModelCard.load(card).data.pipeline_tag == task


def test_its_code_runs(folder: Path) -> None:
    text = write_model_card(folder, None, repo_id=str(folder)).read_text()
    with_package, without = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "trust_remote_code=True" in without and "trust_remote_code" not in with_package
    scope: dict = {}
    exec(with_package, scope)
    assert isinstance(scope["model"], modeling.LLMKernelForCausalLM)
    assert scope["pipe"]("the quick", max_new_tokens=2)[0]["generated_text"].startswith("the quick")


def test_another_familys_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="config.json is missing or of another family"):
        write_model_card(tmp_path, None)
    assert not (tmp_path / "README.md").exists()


def test_report_of_several_models_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="report: is of 2 models"):
        write_model_card(folder, {"models": [BASELINE.to_dict(), REPORT.to_dict()]})
