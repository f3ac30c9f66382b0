"""What the start-up hook costs: Python's start and `import transformers`, with it and without, interleaved.

    python scripts/bench/startup.py --rounds 40

Two bare environments see the packages of the one this runs in; one of them also has the hook. Each round starts all
both processes of a kind, in an order that turns; what is taken is their processor time, for the clock of a busy machine
measures its other users. Prints one JSON document: medians in seconds, and median and quartiles of the ratio of the two
processes of a round.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What is run, and how many times a round: the shorter, the noisier.
CODES = {
    "python": ("pass", 20),
    "transformers": ("import transformers", 1),
    "auto_model": ("from transformers import AutoModelForCausalLM", 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the start-up hook.")
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        interpreters = {hooked: make_environment(Path(folder) / str(hooked), hooked) for hooked in (False, True)}
        measured = {name: measure(interpreters, code, rounds * times) for name, (code, times) in CODES.items()}
    print(json.dumps({"rounds": rounds, **measured}, indent=2))


def make_environment(folder: Path, hooked: bool) -> Path:
    """An environment without packages of its own but the hook; returns its interpreter."""
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A folder named in a .pth file is searched, its own .pth files are not read.
    (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    if hooked:
        for file in (ROOT / "startup").glob("hf_llmkernel_hook.*"):
            shutil.copy(file, packages)
    return folder / "bin" / "python"


def measure(interpreters: dict[bool, Path], code: str, rounds: int) -> dict[str, float | list[float]]:
    """Seconds without and with the hook, and their ratio with its quartiles."""
    for interpreter in interpreters.values():
        seconds_of(interpreter, code)  # writes bytecode, fills the file cache
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for index in range(rounds):
        for hooked in (False, True) if index % 2 else (True, False):
            seconds[hooked].append(seconds_of(interpreters[hooked], code))
    ratios = [with_hook / without for without, with_hook in zip(seconds[False], seconds[True], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "seconds_without": round(statistics.median(seconds[False]), 5),
        "seconds_with": round(statistics.median(seconds[True]), 5),
        "ratio": round(middle, 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
    }


def seconds_of(interpreter: Path, code: str) -> float:
    """Processor time of a process, its own and the system's for it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([interpreter, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
