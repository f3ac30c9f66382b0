"""Speed and memory: the arithmetic on made-up samples, and two models measured for real in clean processes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tqdm import tqdm

from hf_llmkernel.evaluate import choose_dtype, clean_process, measure_speed, speed
from hf_llmkernel.evaluate.ceilings import Pace, best_pace, product_peak
from hf_llmkernel.evaluate.speed import Case, CleanProcess, Rate, Rounds, Sample, SpeedSettings

from .conftest import edit_config

SMALL = SpeedSettings(
    prefill_tokens=16, prompt_tokens=4, new_tokens=6, repeats=2, threads=1, sample_tokens=5, trust_remote_code=True
)


def test_the_dtype_is_the_faster_one_or_the_one_given(monkeypatch):
    costs = {torch.float32: 2.0, torch.bfloat16: 3.0}
    monkeypatch.setattr(speed, "_matmul_cost", lambda dtype: costs[dtype])
    assert choose_dtype() == "float32"
    costs[torch.bfloat16] = 1.0
    assert choose_dtype() == "bfloat16"
    assert choose_dtype("float16") == "float16"
    with pytest.raises(ValueError, match=r"dtype='int8': choose one of \['auto', 'float32', 'bfloat16', 'float16'\]"):
        choose_dtype("int8")


def test_the_probe_of_this_cpu_takes_little_and_answers():
    assert choose_dtype("auto", repeats=1) in ("float32", "bfloat16")


def taken(seconds: float, pace: float = 1.0) -> Sample:
    return Sample(seconds, Pace(pace, 1.0))


DECODE, BEST = Case("decode", tokens=9), Pace(1.0, 1.0)


def test_a_case_counts_the_tokens_that_its_time_covers():
    assert (DECODE.counted, Case("decode", 9, batch=4).counted, Case("prefill", 9, batch=4).counted) == (8, 32, 36)


def test_a_pace_is_that_of_the_slower_part():
    assert Pace(80.0, 9.0).share_of(Pace(100.0, 10.0)) == 0.8
    assert Pace(90.0, 5.0).share_of(Pace(100.0, 10.0)) == 0.5
    assert best_pace([Pace(1.0, 4.0), Pace(3.0, 2.0)]) == Pace(3.0, 4.0)


def test_a_rate_is_the_median_of_the_samples_that_were_not_held_back():
    samples = [taken(2.0), taken(1.0), taken(4.0), taken(100.0, pace=0.7)]
    assert speed._rate(DECODE, samples, BEST) == Rate(4.0, 2.0, 8.0, samples=3, held_back=1)


def test_where_most_samples_are_held_back_all_count_and_it_is_said():
    samples = [taken(1.0), taken(2.0, pace=0.1), taken(4.0, pace=0.1)]
    assert speed._rate(DECODE, samples, BEST) == Rate(4.0, 2.0, 8.0, samples=3, held_back=2)
    assert speed._rate(DECODE, samples[:2], BEST) == Rate(6.0, 4.0, 8.0, samples=2, held_back=1)


class Scripted:
    """A process that answers at once, and a calibration of given paces."""

    def __init__(self, name, asked):
        self.name, self.asked = name, asked

    def ask(self, command):
        self.asked.append((self.name, json.loads(command.partition(" ")[2])["kind"]))
        return {"seconds": 1.0, "peak_bytes": len(self.asked)}


def scripted_rounds(monkeypatch, paces, repeats=2, budget_seconds=60.0):
    asked = []
    given = iter(paces)
    monkeypatch.setattr(speed, "Calibration", lambda: None)
    monkeypatch.setattr(Rounds, "_calibrate", lambda self, _: self.paces.append(next(given, BEST)) or self.paces[-1])
    rounds = Rounds([Scripted("a", asked), Scripted("b", asked)], [Case("prefill", 4), DECODE], threads=1)
    rounds.run(replace(SMALL, repeats=repeats, budget_seconds=budget_seconds), tqdm(disable=True, total=0))
    return rounds, asked


def test_models_take_turns_case_by_case(monkeypatch):
    rounds, asked = scripted_rounds(monkeypatch, [])
    turn = [("a", "prefill"), ("b", "prefill"), ("a", "decode"), ("b", "decode")]
    assert asked == turn * 2
    assert rounds.peaks == [7, 8]


def test_rounds_go_on_for_the_cases_that_were_held_back(monkeypatch):
    # A slow calibration follows the fourth sample, of "b" decoding, and precedes the fifth, of "a" prefilling.
    rounds, asked = scripted_rounds(monkeypatch, [BEST] * 4 + [Pace(0.5, 1.0)])
    assert asked[8:] == asked[:4]
    assert [sample.pace.read for sample in rounds.samples[DECODE][1]] == [0.5, 1.0, 1.0]
    _, asked = scripted_rounds(monkeypatch, [BEST] + [Pace(1.0, 0.5)] * 99)
    assert len(asked) == 4 * (2 + speed.EXTRA_ROUNDS)
    _, asked = scripted_rounds(monkeypatch, [BEST] + [Pace(1.0, 0.5)] * 99, budget_seconds=-1.0)
    assert len(asked) == 4


def test_bad_settings():
    with pytest.raises(ValueError, match="new_tokens=1: must be at least 2"):
        SpeedSettings(new_tokens=1)


@pytest.fixture(scope="module")
def settings(saved) -> dict:
    return {**vars(SMALL), "threads": None, "model": str(saved / "llama"), "dtype": "float32", "prompt": "Article"}


@pytest.fixture(scope="module")
def loaded(settings):
    return clean_process.load(settings)[0]


def test_the_end_token_does_not_end_a_measurement(settings, loaded):
    every_token = list(range(loaded.config.vocab_size))
    own = loaded.generation_config
    own.eos_token_id = every_token
    assert clean_process.time_decode(loaded, settings, {"tokens": 6, "batch": 2}) > 0
    assert loaded.generation_config is own and own.eos_token_id == every_token
    own.eos_token_id = None


def test_decode_times_the_tokens_after_the_first(settings, loaded, monkeypatch):
    ticks = iter([10.0, 20.0, 21.0, 22.0, 23.0, 24.0, 26.0])  # the prompt, then six tokens
    monkeypatch.setattr(clean_process.time, "perf_counter", lambda: next(ticks))
    assert clean_process.time_decode(loaded, settings, {"tokens": 6, "batch": 2}) == 6.0


def test_a_sample_continues_or_answers(settings, loaded, saved, tmp_path, tokenizer):
    continued = clean_process.sample(loaded, settings)
    assert continued["prompt"] == "Article" and not continued["chat"]
    assert continued["text"] and not continued["text"].startswith("Article")
    loaded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    (tmp_path / "chat_template.jinja").write_text(template)
    answered = clean_process.sample(loaded, {**settings, "model": str(tmp_path)})
    assert answered["chat"] and answered["text"] and answered["text"] != continued["text"]


def test_peak_memory_is_not_that_of_the_process_that_started_it():
    """`ru_maxrss` would be: it survives the start of another program."""
    code = (
        "import sys, subprocess; block = bytearray(300 << 20); block[::4096] = bytes(len(block[::4096]));"
        "print(subprocess.run([sys.executable, '-c', sys.argv[1]], capture_output=True, text=True).stdout)"
    )
    child = f"import runpy; print(runpy.run_path({clean_process.__file__!r})['peak_bytes']())"
    result = subprocess.run([sys.executable, "-c", code, child], capture_output=True, text=True, check=True)
    assert 0 < int(result.stdout) < 150 << 20


@pytest.fixture(scope="module")
def measured(saved):
    return measure_speed([saved / "llama", saved / "compressed"], "float32", SMALL, progress=False)


def test_the_peak_of_a_product_is_a_number_of_operations():
    assert product_peak("float32", side=64, repeats=1) > 1e6
    assert product_peak("int8", side=64, repeats=1) > 1e6


def test_two_models_in_clean_processes(measured):
    for result in measured:
        assert result.dtype == "float32"
        assert 0 < result.load_seconds < result.first_token_seconds
        for rate in (result.rate(SMALL.prefill), result.rate(SMALL.decode)):
            assert 0 < rate.slowest <= rate.median <= rate.fastest
            assert 2 <= rate.samples + rate.held_back <= 2 * (2 + speed.EXTRA_ROUNDS)
        assert 100 << 20 < result.library_memory_bytes < result.peak_memory_bytes < 2 << 30
        assert result.sample is not None and result.sample["text"]
        assert result.sample_reason is None


def test_a_sample_that_fails_is_a_reason_and_no_error():
    class Failing:
        name = "llama"

        def ask(self, command):
            raise ValueError(f"{command} failed: no tokenizer")

    assert speed._sample(Failing(), tqdm(disable=True)) == (None, "sample failed: no tokenizer")


def test_a_model_that_does_not_load_is_an_input_error_in_one_line(compressed_folder):
    """transformers asks on stdin whether to run the folder's code: it must not take a command for the answer."""
    edit_config(compressed_folder, model_type="unknown_family")
    with CleanProcess(compressed_folder, "float32", replace(SMALL, trust_remote_code=False)) as process:
        for _ in range(2):
            with pytest.raises(ValueError) as error:
                process.ask("load")
            assert str(error.value).startswith("compressed: load failed in a clean process (ValueError: ")
            assert "trust_remote_code" in str(error.value) and "\n" not in str(error.value)
    assert process._process.poll() is not None


def test_a_killed_process_is_a_fault_of_the_machine(saved):
    with CleanProcess(saved / "llama", "float32", SMALL) as process:
        process._process.kill()
        with pytest.raises(MemoryError, match="llama: killed during load"):
            process.ask("load")
