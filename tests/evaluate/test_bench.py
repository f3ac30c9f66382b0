"""`bench`: what a token needs, shares and ratios on made-up samples, and a run on tiny models."""

import json

import pytest
import torch

from hf_llmkernel import cli
from hf_llmkernel.evaluate import speed
from hf_llmkernel.evaluate.bench import bench, ratio, render_bench, token_needs
from hf_llmkernel.evaluate.ceilings import Pace
from hf_llmkernel.evaluate.speed import Case, Sample, Speed

from .conftest import edit_config

BEST, SLOW = Pace(1e9, 1e12), Pace(0.5e9, 1e12)
DECODE, EIGHT, PREFILL = Case("decode", 11), Case("decode", 11, 8), Case("prefill", 100)


def made_up(samples: dict) -> Speed:
    return Speed("float32", samples, BEST, 500, 100, 0.5, 0.75, None, None)


def taken(*seconds: float, paces: list | None = None) -> list[Sample]:
    return [Sample(time, pace) for time, pace in zip(seconds, paces or [BEST] * len(seconds), strict=True)]


@pytest.fixture
def no_processes(monkeypatch):
    """Speeds as made up here. Returns the cases that were asked for."""
    asked = []
    times = {"decode": (1.0, 2.0, 4.0), "prefill": (0.5, 0.5, 0.5)}

    def measure_speed(models, dtype, settings, names, cases):
        asked.append((settings, cases))
        factors = [1.0, 0.5][: len(models)]
        return [
            made_up({case: taken(*(factor * time for time in times[case.kind])) for case in cases})
            for factor in factors
        ]

    monkeypatch.setattr(speed, "measure_speed", measure_speed)
    monkeypatch.setattr("hf_llmkernel.evaluate.ceilings.product_peak", lambda kind: 1e12)
    return asked


def test_what_a_token_needs_is_what_the_model_holds(saved, llama, compressed):
    for name, model in (("llama", llama), ("compressed", compressed)):
        needs = token_needs(saved / name, "float32")
        wanted = {
            key: tensor
            for key, tensor in model.state_dict().items()
            if "norm" not in key and not key.startswith("model.embed_tokens")
        }
        assert needs.bytes == sum(tensor.nbytes for tensor in wanted.values())
    dense = sum(tensor.numel() for key, tensor in llama.state_dict().items() if "_proj" in key)
    assert token_needs(saved / "llama", "float32")[1:] == (2 * dense, False)


def test_floating_weights_count_in_the_dtype_of_the_computation(saved):
    assert token_needs(saved / "llama", "float32").bytes == 2 * token_needs(saved / "llama", "bfloat16").bytes


def test_a_tied_head_is_read_and_a_foreign_family_is_not_known(llama_folder):
    untied = token_needs(llama_folder, "float32").bytes
    edit_config(llama_folder, tie_word_embeddings=True)
    assert token_needs(llama_folder, "float32").bytes == untied
    edit_config(llama_folder, model_type="gpt2")
    assert token_needs(llama_folder, "float32") is None


def test_shares_and_ratios(saved, no_processes):
    result = bench([str(saved / "llama"), str(saved / "compressed")], "100", "1,8", new_tokens=11, dtype="float32")
    first, second = result["models"]
    decode, eight, prefill = first["cases"]
    assert decode["tokens_per_second"]["median"] == 5.0 and eight["tokens_per_second"]["median"] == 40.0
    needs = token_needs(saved / "llama", "float32")
    assert decode["share"] == eight["share"] == pytest.approx(needs.bytes * 5.0 / 1e9)
    assert prefill["share"] == pytest.approx(needs.operations * 200.0 / 1e12)
    assert (decode["share_of"], prefill["share_of"]) == ("memory bandwidth", "float32 products")
    assert decode["ratio"] is None
    assert second["cases"][0]["ratio"] == {"median": 2.0, "lowest": 2.0, "highest": 2.0}
    text = render_bench(result)
    assert "5.0 (2.5-10.0), " in text and "×2.00 (2.00-2.00)" in text and "reads 1.0 GB/s" in text


def test_a_ratio_is_of_rounds_that_were_not_held_back():
    own = made_up({DECODE: taken(1.0, 1.0, 9.0, paces=[BEST, BEST, SLOW])})
    first = made_up({DECODE: taken(2.0, 4.0, 9.0)})
    assert ratio(DECODE, own, first) == {"median": 3.0, "lowest": 2.0, "highest": 4.0}
    own.samples[DECODE] = taken(1.0, 1.0, 9.0, paces=[BEST, SLOW, SLOW])
    assert ratio(DECODE, own, first) == {"median": 2.0, "lowest": 1.0, "highest": 4.0}


def test_lengths_are_cut_to_the_context_and_it_is_said(saved, no_processes):
    result = bench([str(saved / "llama")], "64,512,2048", "1,1", dtype="float32")
    ((settings, cases),) = no_processes
    assert cases == [Case("decode", 32), Case("prefill", 64), Case("prefill", 128)]
    assert result["notes"] == [f"prefill {length} is cut to 128: the context ends there" for length in (512, 2048)]
    assert "prefill 2048 is cut to 128" in render_bench(result)


def test_held_back_samples_are_told(saved, monkeypatch, no_processes):
    slow = made_up({DECODE: taken(1.0, 1.0, 5.0, paces=[BEST, BEST, SLOW])})
    monkeypatch.setattr(speed, "measure_speed", lambda *_, **__: [slow])
    result = bench([str(saved / "llama")], "", "1", new_tokens=11, dtype="float32")
    assert "llama, decode, batch 1: 1 of 3 samples were held back (calibration below 75%" in render_bench(result)
    slow.samples[DECODE] = taken(1.0, 1.0, 5.0, paces=[Pace(1e8, 1e12)] * 3)
    result = bench([str(saved / "llama")], "", "1", new_tokens=11, dtype="float32")
    assert "Every sample was held back" in render_bench(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": "128,x"}, "prefill='128,x': must be whole numbers above 0"),
        ({"batch": "0"}, "batch='0': must be"),
        ({"prefill": "", "batch": " "}, "nothing to measure"),
    ],
)
def test_bad_lists(saved, options, message):
    with pytest.raises(ValueError, match=message):
        bench([str(saved / "llama")], **options)


def test_no_negative_time(saved, capfd):
    assert cli.main(["bench", str(saved / "llama"), "--seconds", "-5"]) == 2
    assert capfd.readouterr().err.startswith("error: Invalid value for '--seconds': ")


def test_a_model_is_measured_for_real(saved, capfd):
    command = ["bench", str(saved / "llama"), "--prefill", "16", "--batch", "2", "--new-tokens", "4", "--repeats", "1"]
    assert cli.main([*command, "--threads", "1", "--dtype", "float32", "--seconds", "0", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    (model,) = result["models"]
    assert [case["kind"] for case in model["cases"]] == ["decode", "prefill"]
    for case in model["cases"]:
        assert case["tokens_per_second"]["median"] > 0 and 0 < case["share"] < 1
    assert 0 < model["load_seconds"] < model["first_token_seconds"]
    assert model["library_memory_bytes"] < model["peak_memory_bytes"]
    assert result["ceilings"]["read_bytes_per_second"] > 1e8
    assert torch.get_num_threads() >= 1
