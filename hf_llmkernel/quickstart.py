"""`llmkernel quickstart`: the main job end to end on a small real model.

fetch -> convert -> compress -> measure both in clean processes -> report. The output folder holds `dense/` and
`compressed/`, two checkpoints that load with plain `AutoModelForCausalLM.from_pretrained`, and the report.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .compress import Compression, Recipe
    from .evaluate import Report


PROMPT = "Explain in two sentences why the sky is blue."
# What a model card says of a built-in model: its name on the Hub, and its licence.
ORIGINS = {"smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}


def quickstart(
    output: Annotated[Path, typer.Option(help="New folder for both checkpoints and the report.")] = Path(
        "llmkernel-quickstart"
    ),
    model: Annotated[
        str, typer.Option(help="Built-in name, Hub id, folder, or .gguf file of a Llama, Mistral, Qwen2 or Qwen3.")
    ] = "smollm2-135m-instruct",
    text: Annotated[
        str,
        typer.Option(
            help="To calibrate and, on other documents of it, to measure: bbc, bible, a .txt or .jsonl file, a folder "
            "of .txt files, or NAME:CONFIG:SPLIT of datasets."
        ),
    ] = "bbc",
    bits: Annotated[int, typer.Option(help="Of every weight: 4, or 8.")] = 4,
    ratio: Annotated[float, typer.Option(help="Share of the feed-forward neurons to remove before.")] = 0.0,
    align: Annotated[int, typer.Option(help="The feed-forward width stays a multiple of it.")] = 64,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a calibration sequence.")] = 512,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a window that perplexity is measured on; default: 1024, or as the model has."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of all these windows.")] = 8192,
    prompt: Annotated[str, typer.Option(help="What both models answer as a sample.")] = PROMPT,
) -> dict[str, Any]:
    """Take a small real model through the main job: convert, compress, measure before and after, report.

    Linears are stored as int4 in groups of 64, each column making up for those before it by what calibration text does
    to them, the embedding in groups of 32; what is left is bfloat16. Both models are measured in new processes, in
    turns.

    Raises:
        ValueError: an output folder in the way, a model or text that cannot be had or is too short.
        OSError: no space, or no connection.
    """
    from .checkpoint import check_output, output_folder
    from .evaluate import write_report
    from .publish import write_model_card

    check_output(output)
    calibration = {"source": text, "samples": samples, "length": length}
    evaluation = {"source": text, "context": context, "tokens": tokens, "prompt": prompt}
    recipe = build_recipe(bits, ratio, align, calibration, evaluation)
    clock = Clock()
    with output_folder(output) as part:
        notes = fetch_dense(model, part / "dense", clock)
        compression = compress_dense(part, recipe, clock)
        report = named_report(compression, Path(model).name.removesuffix(".gguf"))
        for folder in (part, part / "compressed"):
            write_report(report, folder)
        base_model, license = ORIGINS.get(model, (model, None))
        write_model_card(part / "compressed", report.to_dict(), base_model=base_model, license=license)
        files = [str(output / file.name) for file in sorted(part.glob("report.*"))]
    return {
        "dense": str(output / "dense"),
        "compressed": str(output / "compressed"),
        "report": report.to_dict(),
        "stages": compression.stages,
        "notes": [*notes, *ratio_notes(compression.stages)],
        "seconds": clock.rounded(),
        "files": files,
    }


class Clock:
    """Seconds of each step; names the step on stderr when it begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        self.announce(title)
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    def announce(self, title: str) -> None:
        """Names a step on stderr."""
        print(f"== {title}", file=sys.stderr, flush=True)

    def rounded(self) -> dict[str, float]:
        """Seconds by step, and in total."""
        return {name: round(value, 1) for name, value in {**self.seconds, "total": sum(self.seconds.values())}.items()}


def build_recipe(
    bits: int, ratio: float, align: int, calibration: dict[str, Any], evaluation: dict[str, Any]
) -> "Recipe":
    """The recipe of the quickstart; what it leaves floating is bfloat16.

    Near a quarter of the bf16 bytes int4 alone, refitted, is the best there is of pruning, rank, sparsity and integers
    together (`scripts/bench/quantize.py`).
    """
    from .compress import Recipe

    stages: list[Any] = [{"prune_ffn": {"ratio": ratio, "align": align}}] if ratio else []
    if bits == 4:
        stages.append("refit")
        grid = {"bits": 4, "symmetric": False, "zero_point_dtype": "float16"}
        stages.append({"quantize": {**grid, "group_size": 64, "method": "gptq"}})
        stages.append({"quantize": {**grid, "group_size": 32, "method": "hqq", "embeddings": True, "exclude": ["*"]}})
    else:
        stages.append({"quantize": {"bits": bits, "group_size": 64, "embeddings": True}})
    return Recipe.load(
        {"dtype": "bfloat16", "calibration": calibration, "evaluation": evaluation, "stages": stages}
    )


def fetch_dense(model: str, dense: Path, clock: Clock) -> list[str]:
    """Puts the model, as one of this family, into a new folder; returns what readers of the figures must know."""
    import shutil

    from .compress.check import family_folder
    from .convert import convert_checkpoint
    from .data import BUILT_IN_MODELS, fetch_model

    source: str | Path = model
    if model in BUILT_IN_MODELS:
        with clock.step("fetch", f"fetch {model}"):
            source = fetch_model(model)
    with clock.step("convert", f"convert {model}"):
        if (own := family_folder(source)) is not None:
            shutil.copytree(own, dense)
            return []
        from_gguf = str(source).endswith(".gguf")
        # A GGUF file has no dtype of its own; bfloat16 is what such models are released in.
        convert_checkpoint(source, dense, dtype="bfloat16" if from_gguf else None, progress=True)
    if not from_gguf:
        return []
    name = Path(source).name
    return [f"{name} is quantized already: the dense model holds its values in bfloat16, and they are quantized again."]


def compress_dense(part: Path, recipe: "Recipe", clock: Clock) -> "Compression":
    """Runs the recipe on `dense/` into `compressed/`: the work, then both models measured in new processes in turns."""
    from .compress import compress

    stages = " and ".join(dict.fromkeys(stage.name for stage in recipe.stages))
    calibration = recipe.calibration
    text = f"{calibration.samples} x {calibration.length} tokens of {calibration.source}"
    clock.announce(f"{stages}, calibrated on {text}, then measure both models")
    compression = compress(part / "dense", recipe, part / "compressed", progress=True)
    clock.seconds |= {"compress": compression.seconds, "measure": compression.measure_seconds}
    return compression


def named_report(compression: "Compression", title: str) -> "Report":
    """The report with the model's own name instead of the folders'."""
    from .evaluate import Report

    values = compression.report or {}
    baseline = {**values["baseline"], "model": f"{title} dense"}
    return Report.from_dict({**values, "model": f"{title} compressed", "baseline": baseline})


def ratio_notes(stages: list[dict[str, Any]]) -> list[str]:
    """What pruning reached of what was asked for."""
    notes = []
    for stage in stages:
        for result in stage["result"] if "prune_ffn" in stage else []:
            notes.append(
                f"feed-forward neurons a layer: {result['neurons_before']} before, {result['neurons']} after "
                f"({result['ratio_reached']:.2%} removed, {stage['prune_ffn']['ratio']:.2%} asked for)."
            )
    return notes


def render_quickstart(result: dict[str, Any]) -> str:
    """The table before and after, both samples, and where everything is."""
    from .evaluate import Report
    from .evaluate.report import columns, render_reports

    table = render_reports(columns(Report.from_dict(result["report"])))
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    places = [f"{name}: {result[name]}" for name in ("dense", "compressed")]
    places += [f"report: {file}" for file in result["files"]]
    return "\n\n".join([table, "\n".join(result["notes"]), f"time: {seconds}", "\n".join(places)])
