"""`llmkernel evaluate` and `llmkernel inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer

PROMPT = "Explain in two sentences why the sky is blue."


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Folders or Hub ids; several make a table.")],
    text: Annotated[
        str, typer.Option(help="bbc, bible, a .txt or .jsonl file, a folder of .txt files, or NAME:CONFIG:SPLIT.")
    ] = "bbc",
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens of all windows.")] = 8192,
    share: Annotated[float, typer.Option(help="Share of documents withheld from calibration; 1 reads all.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the split into calibration and evaluation documents.")] = 0,
    baseline: Annotated[str | None, typer.Option(help="The model that the others are compared with.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of speed and memory: auto (the faster one here), float32, bfloat16, float16.")
    ] = "auto",
    perplexity: Annotated[bool, typer.Option("--perplexity/--no-perplexity", help="Measure the quality.")] = True,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed and memory.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of the speed measurement.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that a round decodes.")] = 32,
    prompt: Annotated[str, typer.Option(help="What the sample answers or continues.")] = PROMPT,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="New folder for report.json, report.md and report.png.")] = None,
) -> dict[str, Any]:
    """Measure perplexity, speed and memory of checkpoints.

    Perplexity is on windows that do not overlap, in fp32; speed and memory are measured in clean processes that take
    turns. The result has one report a model; with a baseline, that of the baseline is in each.

    Raises:
        ValueError: a damaged or unsupported checkpoint, a text that is too short, an output folder in the way.
    """
    from ..checkpoint import check_output
    from .measure import compare, with_baseline
    from .speed import SpeedSettings

    if output is not None:
        check_output(output)
    reports = compare(
        models if baseline is None else [baseline, *models],
        text=text if perplexity else None,
        context=context,
        tokens=tokens,
        dtype=dtype,
        speed=speed,
        evaluation_share=share,
        seed=seed,
        trust_remote_code=trust_remote_code,
        settings=SpeedSettings(repeats=repeats, new_tokens=new_tokens, seed=seed, prompt=prompt),
    )
    if baseline is not None:
        reports = [with_baseline(report, reports[0]) for report in reports[1:]]
    files = [] if output is None else _write(reports, output)
    return {"models": [report.to_dict() for report in reports], "files": files}


def _write(reports: list[Any], output: Path) -> list[str]:
    from ..checkpoint import output_folder
    from .report import write_report

    with output_folder(output) as part:
        files = write_report(reports[0] if len(reports) == 1 else reports, part)
    return [str(output / path.name) for path in files]


def render_evaluate(result: dict[str, Any]) -> str:
    """The table of an evaluation, the samples, and where the report is."""
    from .report import Report, columns, render_reports

    reports = [Report.from_dict(values) for values in result["models"]]
    files = "\n".join(result["files"])
    return render_reports(columns(reports)) + (f"\n\nreport:\n{files}" if files else "")


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a checkpoint.")],
    full: Annotated[
        bool, typer.Option("--full", help="A line for every module; otherwise layers alike share one.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all weights: finite values, masks as their forms say.")
    ] = False,
) -> dict[str, Any]:
    """Show what a checkpoint holds: shape, form, parameters and bytes of every module.

    Taken from config.json and the headers of the weight files; no model is built.

    Raises:
        ValueError: a damaged file, or a configuration that its tensors contradict.
    """
    from .inventory import inspect as take

    return {**take(model, verify=verify).to_dict(), "full": full}


def render_inspect(result: dict[str, Any]) -> str:
    """The inventory as a table."""
    from .inventory import Entry, Inventory
    from .inventory_table import render_inventory

    values = {name: value for name, value in result.items() if name != "full"}
    entries = tuple(Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in result["entries"])
    return render_inventory(Inventory(**{**values, "entries": entries}), full=result["full"])
