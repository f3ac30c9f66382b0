"""Speed and memory of models, each in a clean process of its own, their rounds interleaved.

Reading order: what is measured -> the dtype to compute in -> rounds over all models -> the samples that count.
Machines are shared and held back at times. So models that are to be compared take turns, a calibration runs before and
after each sample, a sample beside a slow calibration is measured again, and spreads are reported.
"""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import clean_process
from .ceilings import Calibration, Pace, best_pace
from .command import PROMPT
from .inventory import inspect
from .machine import available_bytes

DTYPES = ("float32", "bfloat16", "float16")
STEADY = 0.75  # of the best pace: a calibration below it marks the sample beside it as held back
EXTRA_ROUNDS = 2


@dataclass(frozen=True)
class Case:
    """What is timed: a `prefill` of `tokens` at once, or a `decode` of `tokens` one by one, of `batch` sequences."""

    kind: str
    tokens: int
    batch: int = 1

    @property
    def counted(self) -> int:
        """Tokens within the time taken: a decode is timed from its first token to its last."""
        return self.batch * (self.tokens - 1 if self.kind == "decode" else self.tokens)


@dataclass(frozen=True)
class SpeedSettings:
    """What is measured: `prefill_tokens` at once; `new_tokens` after `prompt_tokens` with greedy `generate`, batch 1.

    `sample_tokens` tokens of text after `prompt` are kept as a sample; 0 makes none. There are `repeats` rounds, a few
    more where the machine was held back; none but the first begins later than `budget_seconds` after the first.
    """

    prefill_tokens: int = 512
    prompt_tokens: int = 32
    new_tokens: int = 32
    repeats: int = 3
    budget_seconds: float = 60.0
    threads: int | None = None
    seed: int = 0
    prompt: str = PROMPT
    sample_tokens: int = 48
    trust_remote_code: bool = False

    def __post_init__(self):
        for name, least in (("prefill_tokens", 1), ("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}.")

    @property
    def prefill(self) -> Case:
        return Case("prefill", self.prefill_tokens)

    @property
    def decode(self) -> Case:
        return Case("decode", self.new_tokens)


@dataclass(frozen=True)
class Sample:
    """Seconds of a case, and the slower of the paces before and after it."""

    seconds: float
    pace: Pace


@dataclass(frozen=True)
class Rate:
    """Tokens a second: the median, slowest and fastest of `samples`; `held_back` others were measured but not used."""

    median: float
    slowest: float
    fastest: float
    samples: int
    held_back: int


@dataclass(frozen=True)
class Speed:
    """Speed and memory of one model.

    Args:
        dtype: of the computation.
        samples: of every case, in the order of the rounds.
        best: the best pace of the machine while all models were measured.
        peak_memory_bytes: most resident memory of a process that loads the model and runs all cases.
        library_memory_bytes: resident memory of that process before it loaded the model.
        load_seconds: of `from_pretrained`.
        first_token_seconds: of `from_pretrained` and the first forward, which lays out what the model computes with.
        sample: `prompt`, `text` and whether it was a `chat` turn; `None` where none was asked for or could be made.
        sample_reason: why there is no sample.
    """

    dtype: str
    samples: dict[Case, list[Sample]]
    best: Pace
    peak_memory_bytes: int
    library_memory_bytes: int
    load_seconds: float
    first_token_seconds: float
    sample: dict[str, Any] | None
    sample_reason: str | None

    def rate(self, case: Case) -> Rate:
        """Tokens a second of a case."""
        return _rate(case, self.samples[case], self.best)

    def is_steady(self, sample: Sample) -> bool:
        """Whether the machine kept its pace beside a sample."""
        return _steady(sample, self.best)


def choose_dtype(dtype: str = "auto", repeats: int = 5) -> str:
    """The dtype to compute in: the one given, or of fp32 and bf16 the one that is faster on this CPU.

    Measured on a pair of products with a 1024 x 1024 weight, of 256 rows (prefill) and of one (decode); the winner has
    the smaller product of both times. CPUs without bf16 instructions emulate them, several times slower in prefill.

    Raises:
        ValueError: a name that is neither `auto` nor a dtype to compute in.
    """
    if dtype in DTYPES:
        return dtype
    if dtype != "auto":
        raise ValueError(f"dtype={dtype!r}: choose one of {['auto', *DTYPES]}.")
    costs = {"float32": math.inf, "bfloat16": math.inf}
    for _ in range(repeats):  # interleaved, so that a slow moment meets both
        for name in costs:
            costs[name] = min(costs[name], _matmul_cost(getattr(torch, name)))
    return min(costs, key=lambda name: costs[name])


def _matmul_cost(dtype: torch.dtype) -> float:
    weight = torch.ones(1024, 1024, dtype=dtype)
    cost = 1.0
    for rows, count in ((256, 2), (1, 16)):
        states = torch.ones(rows, 1024, dtype=dtype)
        start = time.perf_counter()
        for _ in range(count):
            torch.nn.functional.linear(states, weight)
        cost *= (time.perf_counter() - start) / count
    return cost


def measure_speed(
    models: Sequence[str | Path],
    dtype: str = "auto",
    settings: SpeedSettings | None = None,
    names: Sequence[str] | None = None,
    progress: bool = True,
    cases: Sequence[Case] | None = None,
) -> list[Speed]:
    """Measures several models in turns, each in its own clean process; where memory is short, one after the other.

    Args:
        models: folders that `AutoModelForCausalLM.from_pretrained` loads without an import of this package.
        dtype: to compute in, see `choose_dtype`.
        settings: see `SpeedSettings`.
        names: of the models, for the bar and for messages; by default their folders'.
        progress: whether to draw a bar on stderr.
        cases: to be timed; by default prefill and decode as the settings have them.

    Raises:
        ValueError: a model does not load or generate.
        MemoryError: the system killed a process.
    """
    settings = settings or SpeedSettings()
    dtype = choose_dtype(dtype)
    cases = list(cases or (settings.prefill, settings.decode))
    named = list(zip(models, names or [Path(model).name for model in models], strict=True))
    groups = [named] if _fit_together(models, dtype) else [[pair] for pair in named]
    steps = len(models) * (1 + (1 + settings.repeats) * len(cases) + bool(settings.sample_tokens))
    with tqdm(total=steps, desc=f"speed ({dtype})", unit="step", disable=not progress) as bar:
        return [speed for group in groups for speed in _measure_group(group, dtype, settings, cases, bar)]


def _fit_together(models: Sequence[str | Path], dtype: str) -> bool:
    """Whether all models are sure to fit in half of the memory that is available."""
    width = getattr(torch, dtype).itemsize
    return sum(inspect(model).dense_parameters * width for model in models) < available_bytes() / 2


def _measure_group(
    named: list[tuple[str | Path, str]], dtype: str, settings: SpeedSettings, cases: list[Case], bar: tqdm
) -> list[Speed]:
    with ExitStack() as stack:
        processes = [stack.enter_context(CleanProcess(model, dtype, settings, name)) for model, name in named]
        loads = [_ask(process, "load", bar) for process in processes]
        for process in processes:
            for case in cases:  # a warm-up
                _ask(process, _measure_command(case), bar)
        rounds = Rounds(processes, cases, settings.threads)
        rounds.run(settings, bar)
        texts = [_sample(process, bar) if settings.sample_tokens else (None, None) for process in processes]
    return [
        Speed(
            dtype,
            {case: rounds.samples[case][index] for case in cases},
            best_pace(rounds.paces),
            rounds.peaks[index],
            load["library_bytes"],
            load["load_seconds"],
            load["first_token_seconds"],
            *texts[index],
        )
        for index, load in enumerate(loads)
    ]


class Rounds:
    """Samples of all models: in a round every case that still needs some is timed of one model after the other.

    `samples` are lists under the case and the number of the model, `peaks` the most bytes that a model's process took.
    """

    def __init__(self, processes: "list[CleanProcess]", cases: Sequence[Case], threads: int | None):
        self.processes = processes
        self.samples: dict[Case, list[list[Sample]]] = {case: [[] for _ in processes] for case in cases}
        self.peaks = [0] * len(processes)
        self.threads = threads or torch.get_num_threads()
        self.paces: list[Pace] = []

    def run(self, settings: SpeedSettings, bar: tqdm) -> None:
        calibration = Calibration()
        self._calibrate(calibration)
        start = time.monotonic()
        for turn in range(settings.repeats + EXTRA_ROUNDS):
            cases = [case for case in self.samples if not self._is_steady(case, settings.repeats)]
            if not cases or (turn and time.monotonic() - start > settings.budget_seconds):
                break
            if turn >= settings.repeats:
                bar.total += len(cases) * len(self.processes)
            for case in cases:
                for index in range(len(self.processes)):
                    self._take(case, index, calibration, bar)

    def _take(self, case: Case, index: int, calibration: Calibration, bar: tqdm) -> None:
        answer = _ask(self.processes[index], _measure_command(case), bar)
        before = self.paces[-1]
        after = self._calibrate(calibration)
        slower = Pace(min(before.read, after.read), min(before.product, after.product))
        self.samples[case][index].append(Sample(answer["seconds"], slower))
        self.peaks[index] = max(self.peaks[index], answer["peak_bytes"])

    def _calibrate(self, calibration: Calibration) -> Pace:
        with _torch_threads(self.threads):
            self.paces.append(calibration.pace())
        return self.paces[-1]

    def _is_steady(self, case: Case, repeats: int) -> bool:
        """Whether every model has `repeats` samples of a case that no slow calibration accompanied."""
        best = best_pace(self.paces)
        return all(sum(_steady(sample, best) for sample in taken) >= repeats for taken in self.samples[case])


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure_command(case: Case) -> str:
    return f"measure {json.dumps(asdict(case))}"


def _ask(process: "CleanProcess", command: str, bar: tqdm) -> dict[str, Any]:
    bar.set_postfix_str(f"{process.name}: {command.partition(' ')[0]}")
    answer = process.ask(command)
    bar.update()
    return answer


def _sample(process: "CleanProcess", bar: tqdm) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return _ask(process, "sample", bar), None
    except ValueError as error:
        bar.update()
        return None, str(error)


def _steady(sample: Sample, best: Pace) -> bool:
    return sample.pace.share_of(best) >= STEADY


def _rate(case: Case, samples: Sequence[Sample], best: Pace) -> Rate:
    """The rate over the samples whose calibration was steady; over all, where those are fewer than half or than two."""
    steady = [sample for sample in samples if _steady(sample, best)]
    used = steady if len(steady) >= max(2, len(samples) / 2) else samples
    rates = [case.counted / sample.seconds for sample in used]
    return Rate(statistics.median(rates), min(rates), max(rates), len(used), len(samples) - len(steady))


class CleanProcess:
    """A process that runs `clean_process.py` on one model; use it in a `with` block."""

    def __init__(self, model: str | Path, dtype: str, settings: SpeedSettings, name: str | None = None):
        self.name = name or Path(model).name
        self.dtype = dtype
        self.settings = settings
        job = json.dumps({"model": str(model), "dtype": dtype, **asdict(settings)})
        environment = {"TRANSFORMERS_VERBOSITY": "error", **os.environ}
        # -P: the script's own folder must not provide modules to whatever it imports.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(clean_process.__file__), job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def __enter__(self) -> "CleanProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to a command. Raises `ValueError` where it failed, `MemoryError` where the process was killed."""
        named = command.partition(" ")[0]
        try:
            self._process.stdin.write(f"{command}\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
            line = self._process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            line = ""
        if not line:
            self._raise_ended(named)
        answer = json.loads(line)
        if "error" in answer:
            self._raise_failed(named, answer)
        return answer

    def _raise_ended(self, command: str) -> None:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            raise MemoryError(f"{self.name}: killed during {command}, likely out of memory; free some or skip speed.")
        raise RuntimeError(f"{self.name}: its process ended during {command} with code {code}; see its messages above.")

    def _raise_failed(self, command: str, answer: dict[str, Any]) -> None:
        reason = " ".join(answer["error"].split())
        if answer["type"] in ("MemoryError", "OutOfMemoryError"):
            raise MemoryError(f"{self.name}: out of memory during {command} ({reason}); free some or skip speed.")
        raise ValueError(
            f"{self.name}: {command} failed in a clean process ({answer['type']}: {reason}); check that plain "
            "AutoModelForCausalLM loads this folder, with trust_remote_code where it needs that."
        )
