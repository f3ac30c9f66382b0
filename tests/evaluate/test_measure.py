"""Whole evaluations of tiny models: the protocol end to end, comparisons, and every kind of bad input."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_llmkernel
from hf_llmkernel.data import load_documents, split_documents, token_windows
from hf_llmkernel.evaluate import Report, compare, evaluate, measure, perplexity
from hf_llmkernel.evaluate.ceilings import Pace
from hf_llmkernel.evaluate.measure import fit_settings, with_baseline
from hf_llmkernel.evaluate.source import model_titles
from hf_llmkernel.evaluate.speed import Sample, Speed, SpeedSettings

from .conftest import edit_config

QUICK = {"context": 64, "tokens": 320, "speed": False, "progress": False}


@pytest.fixture
def no_processes(monkeypatch):
    """Speeds as `measure_speed` would give them. Returns what it was asked for."""
    asked = []

    def measure_speed(models, dtype, settings, names, progress):
        asked.append((list(models), dtype, settings))
        best, slow = Pace(1.0, 1.0), Pace(0.5, 1.0)
        samples = {
            case: [Sample(case.counted / rate, best) for rate in (10.0, 9.0, 11.0)] + [Sample(99.0, slow)]
            for case in (settings.prefill, settings.decode)
        }
        sample = {"prompt": "p", "text": "t", "chat": False}
        return [Speed("bfloat16", samples, best, 500, 100, 1.0, 1.5, sample, None) for _ in models]

    monkeypatch.setattr(measure, "measure_speed", measure_speed)
    return asked


def test_the_protocol_is_windows_of_the_withheld_documents_in_fp32(saved, text, llama, tokenizer):
    report = evaluate(saved / "llama", text, **QUICK)
    withheld = split_documents(load_documents(text), 0.1, 0)[1]
    windows = token_windows(tokenizer, withheld, context=64, tokens=320)
    expected = perplexity(llama, windows, progress=False)
    assert report.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert report.perplexity_standard_error == pytest.approx(expected.standard_error, rel=1e-4)
    assert (report.context_length, report.tokens_evaluated, report.windows) == (64, 320, 5)
    assert (report.model, report.text, report.evaluation_share, report.seed) == ("llama", "articles.jsonl", 0.1, 0)
    assert set(report.reasons.values()) == {"speed was not asked for"} and "sample" in report.reasons
    assert report.machine["cpu"] and report.versions["hf_llmkernel"] == hf_llmkernel.__version__


def test_a_baseline_is_measured_on_the_same_windows(saved, text):
    report = evaluate(saved / "compressed", text, baseline=saved / "llama", **QUICK)
    alone = evaluate(saved / "compressed", text, **QUICK)
    dense = evaluate(saved / "llama", text, **QUICK)
    assert report.perplexity == pytest.approx(alone.perplexity)
    assert report.baseline is not None and report.baseline.model == "llama"
    assert report.baseline_perplexity == pytest.approx(dense.perplexity)
    assert report.perplexity_ratio == pytest.approx(alone.perplexity / dense.perplexity)
    assert evaluate(saved / "compressed", text, baseline=dense, **QUICK).perplexity_ratio == report.perplexity_ratio


def test_the_error_of_the_ratio_is_that_of_the_differences(saved, text):
    dense = evaluate(saved / "llama", text, **QUICK)
    nlls = [nll + math.log(2) for nll in dense.window_nlls]
    shifted = replace(dense, perplexity=dense.perplexity * 2, window_nlls=nlls)
    result = with_baseline(shifted, dense)
    assert result.perplexity_ratio == pytest.approx(2)
    assert result.perplexity_ratio_standard_error == pytest.approx(0, abs=1e-9)


def test_other_windows_give_no_ratio_but_a_reason(saved, text):
    dense = evaluate(saved / "llama", text, **QUICK)
    other = evaluate(saved / "llama", text, **{**QUICK, "seed": 1})
    result = with_baseline(other, dense)
    assert result.baseline_perplexity is None and result.perplexity_ratio is None
    assert "other windows" in result.reasons["baseline_perplexity"]


def test_without_text_the_quality_is_null_with_a_reason(saved):
    report = evaluate(saved / "llama", None, speed=False)
    assert report.perplexity is None and report.tokens_evaluated is None
    assert report.reasons["perplexity"] == "no evaluation text was given"


def test_a_model_in_memory_is_measured_like_its_folder(saved, text, compressed, tokenizer, no_processes):
    report = hf_llmkernel.evaluate(compressed, text, tokenizer=tokenizer, name="mine", **QUICK)
    folder = evaluate(saved / "compressed", text, **QUICK)
    assert report.model == "mine"
    assert report.perplexity == pytest.approx(folder.perplexity)
    assert (report.parameters, report.bytes_on_disk) == (folder.parameters, folder.bytes_on_disk)


def test_speeds_of_all_models_are_measured_together_and_reported(saved, no_processes):
    reports = compare([saved / "llama", saved / "compressed"], None, dtype="bfloat16", progress=False)
    ((models, dtype, settings),) = no_processes
    assert models == [saved / "llama", saved / "compressed"] and dtype == "bfloat16"
    assert settings.prefill_tokens == 128  # of its 128 positions
    for report in reports:
        assert (report.decode_tokens_per_second, report.peak_memory_bytes, report.dtype) == (10.0, 500, "bfloat16")
        assert report.decode_spread == {"median": 10.0, "slowest": 9.0, "fastest": 11.0, "samples": 3, "held_back": 1}
        assert report.sample == {"prompt": "p", "text": "t", "chat": False}
        assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_lengths_fit_the_shortest_model():
    short = fit_settings(SpeedSettings(), 40)
    assert (short.prefill_tokens, short.prompt_tokens, short.new_tokens) == (40, 20, 20)
    assert fit_settings(SpeedSettings(), 4096) == SpeedSettings()


def test_models_of_one_name_are_told_apart_by_their_parents(saved, tmp_path):
    copy = tmp_path / "yours" / "llama"
    AutoModelForCausalLM.from_pretrained(saved / "llama").save_pretrained(copy)
    reports = compare([saved / "llama", copy], None, speed=False)
    assert [report.model for report in reports] == [f"{saved.name}/llama", "yours/llama"]


def test_names_of_hub_models_and_models_in_memory(llama):
    assert model_titles(["org/tiny", llama, "other/small"]) == ["tiny", "LlamaForCausalLM", "small"]


def test_nan_in_a_checkpoint_names_the_tensor(llama_folder, text):
    tensors = load_file(llama_folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = torch.nan
    save_file(tensors, llama_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"perplexity=nan: .*model.layers.1.self_attn.v_proj.weight holds 1 values"):
        evaluate(llama_folder, text, **QUICK)


def test_damaged_and_unsupported_folders(llama_folder, text, tmp_path):
    weights = llama_folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-64])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        evaluate(llama_folder, text, **QUICK)
    weights.write_bytes(content)
    edit_config(llama_folder, model_type="bert", architectures=["BertModel"])
    with pytest.raises(ValueError, match="is not a causal|no causal model|it would be random"):
        evaluate(llama_folder, text, **QUICK)
    with pytest.raises(ValueError, match="has no config.json"):
        evaluate(tmp_path, text, **QUICK)


def test_text_and_tokenizer_that_do_not_do(llama_folder, text, tmp_path):
    with pytest.raises(ValueError, match=r"context=100: the text has \d+ tokens"):
        (tmp_path / "short.txt").write_text("only a few words\n\n\nin two documents")
        evaluate(llama_folder, tmp_path / "short.txt", **{**QUICK, "context": 100})
    with pytest.raises(ValueError, match="context=256: is above the model's max_position_embeddings=128"):
        evaluate(llama_folder, text, **{**QUICK, "context": 256})
    for path in llama_folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="no tokenizer loads from it"):
        evaluate(llama_folder, text, **QUICK)
