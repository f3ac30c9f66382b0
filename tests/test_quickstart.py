"""The main job on a tiny random model: every figure of the report against what the folders really hold."""

import contextlib
import io
import json
import math
import random

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from hf_llmkernel.cli import main
from hf_llmkernel.compress import Recipe
from hf_llmkernel.data import load_documents, split_documents, token_windows
from hf_llmkernel.quickstart import build_recipe

from .compress.conftest import TINY, WORDS, word_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "llama"
    torch.manual_seed(0)
    fields = {**TINY, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    choose = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n\n".join(" ".join(choose.choices(WORDS, k=50)) for _ in range(200)), encoding="utf-8")
    return file


def arguments(output, source, text, *more):
    small = ["--ratio", "0.125", "--align", "8", "--samples", "8", "--length", "64"]
    given = ["--output", output, "--model", source, "--text", text, *small, "--context", "64", "--tokens", "192"]
    return list(map(str, ["quickstart", *given, *more]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, source, text):
    """The output folder of one run, its JSON result, and what it drew."""
    output = tmp_path_factory.mktemp("run") / "result"
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes it starts
        assert main(arguments(output, source, text, "--json")) == 0
    return output, json.loads(stream.getvalue())


def test_both_folders_are_whole_checkpoints(finished):
    output, _ = finished
    for name in ("dense", "compressed"):
        files = {path.name for path in (output / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_llm_kernel.py"} <= files
        generate = pipeline("text-generation", model=str(output / name), device="cpu")
        assert generate("w1 w2", max_new_tokens=3)[0]["generated_text"].startswith("w1 w2")
    assert not output.with_name("result.part").exists()


def test_compressed_is_pruned_by_an_eighth_and_int4(finished):
    output, result = finished
    config = json.loads((output / "compressed" / "config.json").read_text())
    assert config["intermediate_size"] == 56 and config["dtype"] == "bfloat16"
    assert {form["bits"] for form in config["linear_forms"].values()} == {4} and len(config["linear_forms"]) == 7
    assert config["embed_tokens_form"]["bits"] == 4 and config["embed_tokens_form"]["group_size"] == 32
    assert result["notes"][-1].startswith("feed-forward neurons a layer: 64 before, 56 after (12.50% removed")
    stages = Recipe.load(output / "compressed" / "recipe.yaml").stages
    assert [stage.name for stage in stages] == ["prune_ffn", "refit", "quantize", "quantize"]


@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_is_pruned_unless_asked(bits):
    recipe = build_recipe(bits, 0.0, 64, {"source": "bbc"}, {"source": "bbc"})
    assert {stage.name for stage in recipe.stages} == {"quantize", *(["refit"] if bits == 4 else [])}
    assert {stage.bits for stage in recipe.stages if stage.name == "quantize"} == {bits}
    assert recipe.stages[-1].embeddings and recipe.dtype == "bfloat16"


def test_perplexities_are_those_of_the_saved_models(finished, text):
    output, result = finished
    documents = split_documents(load_documents(text))[1]
    windows = token_windows(AutoTokenizer.from_pretrained(output / "dense"), documents, 64, 192)
    report = result["report"]
    assert report["tokens_evaluated"] == windows.numel() == 192 and report["context_length"] == 64
    for name, measured in (("dense", report["baseline_perplexity"]), ("compressed", report["perplexity"])):
        model = AutoModelForCausalLM.from_pretrained(output / name, dtype=torch.float32)
        with torch.no_grad():
            loss = sum(float(model(row[None], labels=row[None]).loss) for row in windows) / len(windows)
        assert measured == pytest.approx(math.exp(loss), rel=1e-4)


def test_sizes_are_those_of_the_files(finished):
    output, result = finished
    for name, report in (("compressed", result["report"]), ("dense", result["report"]["baseline"])):
        file = output / name / "model.safetensors"
        assert report["bytes_on_disk"] == file.stat().st_size
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= report["bytes_on_disk"]
    dense = sum(tensor.numel() for tensor in load_file(output / "dense" / "model.safetensors").values())
    assert result["report"]["baseline"]["parameters"] == dense
    assert result["report"]["parameters"] == dense - 3 * 3 * 8 * 32


def test_speed_and_memory_were_measured(finished):
    _, result = finished
    for report in (result["report"], result["report"]["baseline"]):
        assert report["decode_tokens_per_second"] > 1 and report["prefill_tokens_per_second"] > 1
        assert report["decode_spread"]["samples"] >= 1
        assert report["peak_memory_bytes"] > report["library_memory_bytes"] > 10**7
        assert report["sample"]["text"]
    assert set(result["seconds"]) == {"convert", "compress", "measure", "total"}


def test_report_files_hold_the_same(finished):
    output, result = finished
    assert result["files"] == [str(output / f"report.{ending}") for ending in ("json", "md", "png")]
    for folder in (output, output / "compressed"):
        assert json.loads((folder / "report.json").read_text()) == result["report"]
        assert f"{result['report']['perplexity']:.2f}" in (folder / "report.md").read_text()
        with Image.open(folder / "report.png") as picture:
            assert min(picture.size) > 300


def test_table_for_people_names_the_conditions(finished):
    from hf_llmkernel.quickstart import render_quickstart

    output, result = finished
    printed = render_quickstart(result)
    for part in ("llama dense", "llama compressed", "192 tokens, context 64", "peak memory", str(output / "dense")):
        assert part in printed


def test_output_in_the_way_is_left_alone(finished, source, text, capsys):
    output, _ = finished
    before = sorted(path.name for path in output.rglob("*"))
    assert main(arguments(output, source, text)) == 2
    assert "exists and is not empty; choose another folder or remove it" in capsys.readouterr().err
    assert sorted(path.name for path in output.rglob("*")) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ratio", "1"], "ratio=1"),
        (["--bits", "3"], "bits=3: must be 8 or 4"),
        (["--align", "64"], "ratio=0.125: of 64 leaves 56"),
        (["--samples", "20000"], "lower either or give a longer text"),
        (["--context", "129"], "evaluation.context=129: is above"),
        (["--model", "no/such/model"], "neither a folder, a .gguf file nor a Hub id"),
        (["--text", "no-such-text"], "is no file or folder and not built in"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, source, text, capsys, more, message):
    assert main(arguments(tmp_path / "out", source, text, *more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]
    assert not list(tmp_path.iterdir())
