"""hf_llmkernel against its peers on the same weights, in turns; `peers.sh` installs them and calls this.

    scripts/bench/peers.sh DENSE [--output scripts/bench/peers.json] [--systems hf_llmkernel llama.cpp …] [--rounds 7]

From DENSE are made, once, below the peers' folder: int4 and int8 in groups of 32 (the blocks of Q4_0 and Q8_0, by
rounding, embedding and head too), each as a GGUF file with the same codes and scales, the dense weights as GGUF in
BF16, and a Llama folder for what reads those and quantizes itself. Every contender is a process of its own with as many
threads as the others (`peers_worker.py`), loaded and warm all the time; in a round each is timed once a case. A
calibration runs before and after each sample, and rounds are added for samples that a slow one accompanied. Medians,
the slowest and the fastest; ratios are of the samples of one round. Writes FILE.json and a chart, FILE.png.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from hf_llmkernel.compress import compress
from hf_llmkernel.convert import export_checkpoint
from hf_llmkernel.evaluate.bench import ratio
from hf_llmkernel.evaluate.ceilings import best_pace
from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions
from hf_llmkernel.evaluate.plot import AFTER, BEFORE, INK, MUTED
from hf_llmkernel.evaluate.speed import Case, CleanProcess, Rounds, Speed, SpeedSettings
from hf_llmkernel.kernels import isa

OWN = "hf_llmkernel"
BITS = {"int4": 4, "int8": 8}
CASES = {
    "decode, batch 1": Case("decode", 64),
    "decode, batch 8": Case("decode", 64, 8),
    "prefill 512": Case("prefill", 512),
}
REST_SECONDS = 0.3  # after an answer: threads that wait for more work stop spinning
IDLE_SHARE = 0.05  # of a core: more than this taken between answers would slow the others


@dataclass(frozen=True)
class Contender:
    """A system with weights of a form, under the system's own name for it, and which of the models made it loads."""

    system: str
    form: str
    title: str
    model: str


CONTENDERS = (
    Contender(OWN, "int4", "int4 g32", "int4"),
    Contender("llama.cpp", "int4", "Q4_0", "gguf_int4/model.gguf"),
    Contender("OpenVINO", "int4", "Q4_0", "gguf_int4/model.gguf"),
    Contender("torchao", "int4", "int4 g32", "llama"),
    Contender("bitsandbytes", "int4", "nf4", "llama"),
    Contender(OWN, "int8", "int8 g32", "int8"),
    Contender("llama.cpp", "int8", "Q8_0", "gguf_int8/model.gguf"),
    Contender("OpenVINO", "int8", "Q8_0", "gguf_int8/model.gguf"),
    Contender("torchao", "int8", "int8", "llama"),
    Contender("bitsandbytes", "int8", "int8", "llama"),
    Contender("CTranslate2", "int8", "int8", "llama"),
    Contender(OWN, "bf16", "bf16", "dense"),
    Contender("llama.cpp", "bf16", "BF16", "gguf_bf16/model.gguf"),
    Contender("transformers", "bf16", "bf16", "llama"),
)


def main() -> None:
    arguments = parse_arguments()
    models = make_models(arguments.dense, arguments.peers / "models")
    chosen = [contender for contender in CONTENDERS if contender.system in arguments.systems]
    with ExitStack() as stack:
        running, missing = start_all(chosen, models, arguments, stack)
        speeds = measure(running, arguments)
        results = [figures(running[contender], speed, contender) for contender, speed in speeds.items()]
    content = {
        "results": results,
        "ratios": ratios(speeds),
        "not_measured": missing,
        "prompt_tokens_of_decode": 32,
        "new_tokens_of_decode": 64,
        "rounds": arguments.rounds,
        "isa": isa(),
        "machine": describe_machine() | {"threads": arguments.threads},
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).parent),
    }
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    draw(content, arguments.output.with_suffix(".png"))
    print(table(content))


def parse_arguments() -> argparse.Namespace:
    systems = list(dict.fromkeys(contender.system for contender in CONTENDERS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--peers", type=Path, required=True, help="Folder of their environments; peers.sh names it.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--systems", nargs="*", choices=systems, default=systems)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3600.0, help="No round but the first begins later than this.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def make_models(dense: Path, folder: Path) -> Path:
    """The folder with all that contenders load, under the digest of the dense weights, so that it is made once."""
    digest = hashlib.sha256()
    for file in sorted([dense / "config.json", *dense.glob("*.safetensors")]):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    models = folder / digest.hexdigest()[:16]
    if not (models / "complete").is_file():
        models.mkdir(parents=True, exist_ok=True)
        for form, bits in BITS.items():
            quantize = {"method": "rtn", "bits": bits, "group_size": 32, "symmetric": True, "embeddings": True}
            recipe = {"dtype": "bfloat16", "evaluation": {"speed": False}, "stages": [{"quantize": quantize}]}
            if not (models / form).is_dir():
                compress(dense, recipe, models / form)
            if not (models / f"gguf_{form}").is_dir():
                export_checkpoint(models / form, models / f"gguf_{form}", "gguf")
        export_checkpoint(dense, models / "gguf_bf16", "gguf", type="BF16")
        export_checkpoint(dense, models / "llama", "llama", dtype="bfloat16")
        (models / "dense").symlink_to(dense.resolve())
        (models / "complete").touch()
    return models


class PeerProcess(CleanProcess):
    """A process that runs `peers_worker.py` in the environment of its system; use it in a `with` block."""

    def __init__(self, contender: Contender, python: Path, model: Path, threads: int):
        self.name = f"{contender.system} {contender.title}"
        self.answer: dict[str, Any] = {}
        environment = {"TRANSFORMERS_VERBOSITY": "error", **os.environ, "OMP_NUM_THREADS": str(threads)}
        # Intel's OpenMP would spin for 200 ms after every sample.
        environment["KMP_BLOCKTIME"] = "1"
        worker = [str(Path(__file__).with_name("peers_worker.py")), contender.system, str(model), contender.form]
        self._process = subprocess.Popen(
            [str(python), "-P", *worker, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def ask(self, command: str) -> dict[str, Any]:
        answer = super().ask(command)
        time.sleep(REST_SECONDS)
        return answer

    def idle_share(self, seconds: float = 0.5) -> float:
        """Share of a core that it takes while it is asked nothing."""
        process = psutil.Process(self._process.pid)
        both = [process, *process.children()]  # a server of its own
        before = sum(sum(one.cpu_times()[:2]) for one in both)
        time.sleep(seconds)
        return (sum(sum(one.cpu_times()[:2]) for one in both) - before) / seconds


def start_all(
    contenders: list[Contender], models: Path, arguments: argparse.Namespace, stack: ExitStack
) -> tuple[dict[Contender, PeerProcess], dict[str, str]]:
    """The processes, loaded and warm, and why others are not among them."""
    running, missing = {}, {}
    for contender in tqdm(contenders, desc="loading", unit="contender"):
        python = Path(sys.executable)
        if contender.system != OWN:
            python = arguments.peers / contender.system / "bin" / "python"
            failed = arguments.peers / f"{contender.system}.failed"
            if failed.is_file() or not python.is_file():
                reason = failed.read_text().strip() if failed.is_file() else "is not installed; run peers.sh"
                missing[f"{contender.system} {contender.title}"] = reason
                continue
        process: Any = stack.enter_context(PeerProcess(contender, python, models / contender.model, arguments.threads))
        try:
            process.answer = process.ask("load")
            for case in CASES.values():
                for _ in range(2):  # the second has the caches that the first one left
                    process.ask(f"measure {json.dumps(asdict(case))}")
            process.answer["idle_share"] = process.idle_share()
            if process.answer["idle_share"] > IDLE_SHARE:
                raise ValueError(f"takes {process.answer['idle_share']:.0%} of a core while idle")
            running[contender] = process
        except (ValueError, RuntimeError, MemoryError) as error:
            missing[process.name] = str(error)
            process.__exit__()  # what failed takes no time from the others
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}", file=sys.stderr)
    return running, missing


def measure(running: dict[Contender, PeerProcess], arguments: argparse.Namespace) -> dict[Contender, Speed]:
    processes, cases = list(running.values()), list(CASES.values())
    settings = SpeedSettings(repeats=arguments.rounds, budget_seconds=arguments.seconds, sample_tokens=0)
    rounds = Rounds(processes, cases, arguments.threads)  # type: ignore[arg-type]
    with tqdm(total=arguments.rounds * len(cases) * len(processes), desc="measuring", unit="sample") as bar:
        rounds.run(settings, bar)
    best = best_pace(rounds.paces)
    return {
        contender: Speed(
            "bfloat16",
            {case: rounds.samples[case][index] for case in cases},
            best,
            rounds.peaks[index],
            process.answer["library_bytes"],
            process.answer["load_seconds"],
            process.answer["first_token_seconds"],
            None,
            None,
        )
        for index, (contender, process) in enumerate(running.items())
    }


def figures(process: PeerProcess, speed: Speed, contender: Contender) -> dict[str, Any]:
    return {
        **asdict(contender),
        "weight_bytes": process.answer["weight_bytes"],
        "peak_memory_bytes": speed.peak_memory_bytes,
        "load_seconds": speed.load_seconds,
        "idle_share": process.answer["idle_share"],
        "versions": process.answer["versions"],
        "instructions": process.answer["instructions"],
        "tokens_per_second": {name: asdict(speed.rate(case)) for name, case in CASES.items()},
    }


def ratios(speeds: dict[Contender, Speed]) -> dict[str, Any]:
    """How many times faster own models are than each peer of the same form, by case, round by round."""
    found: dict[str, Any] = {}
    for own, speed in speeds.items():
        peers = {peer: other for peer, other in speeds.items() if peer.form == own.form and peer.system != OWN}
        if own.system != OWN or not peers:
            continue
        found[own.form] = {
            name: {f"{peer.system} {peer.title}": ratio(case, speed, other) for peer, other in peers.items()}
            for name, case in CASES.items()
        }
    return found


def table(content: dict[str, Any]) -> str:
    """Markdown: tokens a second of every contender, with its weights' bytes and the ratio of own to it."""
    lines = ["| system | weights, MB | " + " | ".join(CASES) + " |", "| --- | --- |" + " --- |" * len(CASES)]
    for result in content["results"]:
        name = f"{result['system']} {result['title']}"
        own = content["ratios"].get(result["form"], {})
        cells = [cell(result["tokens_per_second"][case], own.get(case, {}).get(name)) for case in CASES]
        lines.append(f"| {name} | {result['weight_bytes'] / 1e6:.1f} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{name}: {reason}" for name, reason in content["not_measured"].items())])


def cell(rate: dict[str, Any], own: dict[str, float] | None) -> str:
    text = f"{rate['median']:.0f} ({rate['slowest']:.0f}-{rate['fastest']:.0f})"
    return text if own is None else text + ", own ×{median:.2f} ({lowest:.2f}-{highest:.2f})".format(**own)


def draw(content: dict[str, Any], path: Path) -> None:
    """Bars of all contenders by form, a panel a case; own are blue, lines span from the slowest to the fastest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = sorted(content["results"], key=lambda result: list(FORM_ORDER).index(result["form"]))
    figure = Figure(figsize=(13, 1.4 + 0.36 * len(results)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, case in zip(figure.subplots(1, len(CASES), sharey=True), CASES, strict=True):
        draw_case(axes, results, case)
    machine = content["machine"]
    figure.suptitle("Tokens a second on the same weights, medians; lines: slowest to fastest", color=INK, fontsize=13)
    builds = {result["system"]: result["instructions"] for result in results if result["instructions"]}
    built = [f"{name} as built: {text}" for name, text in builds.items()]
    figure.supxlabel("\n".join([f"{machine['cpu']}, {machine['threads']} threads", *built]), color=MUTED, fontsize=9)
    figure.savefig(path, dpi=160)


FORM_ORDER = ("int4", "int8", "bf16")


def draw_case(axes: Any, results: list[dict[str, Any]], case: str) -> None:
    rates = [result["tokens_per_second"][case] for result in results]
    # A gap between forms: each row stands one lower, and a little more where another form begins.
    rows = [place + 0.6 * FORM_ORDER.index(result["form"]) for place, result in enumerate(results)]
    colours = [AFTER if result["system"] == OWN else BEFORE for result in results]
    axes.barh(rows, [rate["median"] for rate in rates], color=colours, height=0.78)
    axes.hlines(rows, [rate["slowest"] for rate in rates], [rate["fastest"] for rate in rates], color=INK, linewidth=1)
    for row, rate in zip(rows, rates, strict=True):
        axes.annotate(
            f"{rate['median']:,.0f}", (rate["fastest"], row), (4, 0), textcoords="offset points", va="center", color=INK
        )
    axes.set_yticks(rows, [f"{result['system']} {result['title']}" for result in results], color=INK)
    axes.set_title(case, color=INK, fontsize=11)
    axes.set_xlim(0, 1.18 * max(rate["fastest"] for rate in rates))
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.tick_params(length=0, labelsize=9)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
