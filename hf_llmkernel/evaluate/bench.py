"""`llmkernel bench MODEL…`: speed, load time and memory, against what the machine reaches and against each other.

Reading order: `bench` -> cases that fit -> what a token needs -> the figures of a model -> text.
"""

import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from .speed import Case, Speed


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Folders or Hub ids; the first is compared to.")],
    prefill: Annotated[
        str, typer.Option(help="Tokens of prompts that are computed at once; '' for none.")
    ] = "128,512,2048",
    batch: Annotated[str, typer.Option(help="Sequences that are decoded together; '' for none.")] = "1,8",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens before those that are decoded.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are decoded.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="No round but the first begins later than this.")] = 300.0,
    dtype: Annotated[
        str, typer.Option(help="To compute in: auto (the faster one here), float32, bfloat16, float16.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of every model. Default: torch's own number.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False,
) -> dict[str, Any]:
    """Measure tokens a second, load time and peak memory of checkpoints.

    Every model runs in a clean process, all take turns case by case. A short calibration (reading memory, multiplying
    matrices) runs before and after each sample: where it falls below three quarters of its best, the sample is held
    back and measured again, twice at most. Shares are of the bandwidth and of the products that torch reaches here.

    Raises:
        ValueError: a model that does not load, a list of lengths that is none.
    """
    from .ceilings import product_peak
    from .machine import describe_machine, describe_versions
    from .measure import fit_settings, longest_context
    from .source import model_folder, model_titles
    from .speed import SpeedSettings, choose_dtype, measure_speed

    lengths, batches = _numbers("prefill", prefill), _numbers("batch", batch)
    folders, titles = [model_folder(model) for model in models], model_titles(models)
    longest = min(longest_context(folder) for folder in folders)
    settings = SpeedSettings(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        budget_seconds=seconds,
        threads=threads,
        sample_tokens=0,
        trust_remote_code=trust_remote_code,
    )
    fitted = fit_settings(settings, longest)
    cases, notes = _cases(lengths, batches, fitted.new_tokens, longest)
    if (fitted.prompt_tokens, fitted.new_tokens) != (prompt_tokens, new_tokens):
        notes.append(f"decode is of {fitted.new_tokens} tokens after {fitted.prompt_tokens}: contexts end at {longest}")
    dtype = choose_dtype(dtype)
    kinds = dict.fromkeys((dtype, "int8"))
    before = {kind: product_peak(kind) for kind in kinds}
    speeds = measure_speed(folders, dtype, fitted, titles, cases=cases)
    products = {kind: max(before[kind], product_peak(kind)) for kind in kinds}
    read = max(speed.best.read for speed in speeds)
    needs = [token_needs(folder, dtype) for folder in folders]
    return {
        "models": [
            {"model": title, **_figures(speed, speeds[0], need, cases, read, products)}
            for title, speed, need in zip(titles, speeds, needs, strict=True)
        ],
        "dtype": dtype,
        "ceilings": {"read_bytes_per_second": read, "operations_per_second": products},
        "prompt_tokens": fitted.prompt_tokens,
        "repeats": repeats,
        "notes": notes,
        "machine": describe_machine() | ({} if threads is None else {"threads": threads}),
        "versions": describe_versions(),
    }


def _numbers(name: str, text: str) -> list[int]:
    """The numbers of a list such as `1,8`; an empty one has none."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ValueError(f"{name}={text!r}: must be whole numbers above 0 with commas between them, such as 1,8.")
    return numbers


def _cases(lengths: list[int], batches: list[int], new_tokens: int, longest: int) -> "tuple[list[Case], list[str]]":
    """The cases without repetition, and what had to be cut to the context of the shortest model."""
    from .speed import Case

    notes = [f"prefill {length} is cut to {longest}: the context ends there" for length in lengths if length > longest]
    cases = [Case("decode", new_tokens, batch) for batch in batches]
    cases += [Case("prefill", min(length, longest)) for length in lengths]
    if not cases:
        raise ValueError("prefill='', batch='': nothing to measure; give one of them a number.")
    return list(dict.fromkeys(cases)), notes


class Needs(NamedTuple):
    """What a token takes, the rows of an embedding that is not the head apart, and so is attention.

    Args:
        bytes: of all weights, as they are stored and in the dtype of the computation where they are floating.
        operations: two for each stored weight of the layers' linears; the head is left out.
        integer: whether most weights of these linears are integers.
    """

    bytes: int
    operations: int
    integer: bool


def token_needs(folder: Path, dtype: str) -> Needs | None:
    """From the configuration alone; `None` for families that are not Llama-shaped."""
    import torch

    from .layout import shape_config, slots, stored_values
    from .source import read_config

    config = shape_config(read_config(folder))
    if config is None:
        return None
    size, operations, integers = 0, 0, 0
    for slot in slots(config, "model.", has_head=True):
        if slot.name.endswith("embed_tokens") and not config.tie_word_embeddings:
            continue
        for shape, own in slot.stored_tensors(getattr(torch, dtype)).values():
            size += math.prod(shape or ()) * getattr(torch, own or dtype).itemsize
        if ".layers." in slot.name:
            values = stored_values(slot.form, slot.out_features, slot.in_features)
            operations += 2 * values
            integers += values * _is_integer(slot.form)
    return Needs(size, operations, 4 * integers > operations)


def _is_integer(form: Any) -> bool:
    parts = [form] if form.rank is None else form.factors
    return any(part.bits < 16 for part in parts)


def _figures(
    speed: "Speed", first: "Speed", needs: Needs | None, cases: "list[Case]", read: float, products: dict[str, float]
) -> dict[str, Any]:
    return {
        "load_seconds": speed.load_seconds,
        "first_token_seconds": speed.first_token_seconds,
        "peak_memory_bytes": speed.peak_memory_bytes,
        "library_memory_bytes": speed.library_memory_bytes,
        "weight_bytes": None if needs is None else needs.bytes,
        "cases": [_figure(case, speed, first, needs, read, products) for case in cases],
    }


def _figure(
    case: "Case", speed: "Speed", first: "Speed", needs: Needs | None, read: float, products: dict[str, float]
) -> dict[str, Any]:
    rate = speed.rate(case)
    product = "int8" if needs is not None and needs.integer else speed.dtype
    share = None
    if needs is not None and case.kind == "decode":
        share = needs.bytes * rate.median / case.batch / read
    elif needs is not None:
        share = needs.operations * rate.median / products[product]
    return {
        "kind": case.kind,
        "tokens": case.tokens,
        "batch": case.batch,
        "tokens_per_second": asdict(rate),
        "taken": len(speed.samples[case]),
        "share": share,
        "share_of": "memory bandwidth" if case.kind == "decode" else f"{product} products",
        "ratio": None if speed is first else ratio(case, speed, first),
    }


def ratio(case: "Case", speed: "Speed", first: "Speed") -> dict[str, float]:
    """Speed against the first model's, round by round: median, lowest and highest.

    Of rounds in which neither was held back; of all, where these are fewer than two.
    """
    # One of two models that memory holds only one after the other may have a round more.
    rounds = list(zip(speed.samples[case], first.samples[case], strict=False))
    steady = [(own, other) for own, other in rounds if speed.is_steady(own) and first.is_steady(other)]
    ratios = [other.seconds / own.seconds for own, other in (steady if len(steady) > 1 else rounds)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def render_bench(result: dict[str, Any]) -> str:
    """The table, what shares are of, and what was held back or cut."""
    from .table import size, text_table

    models = result["models"]
    rows = [
        [_title(case), *(_cell(model["cases"][index]) for model in models)]
        for index, case in enumerate(models[0]["cases"])
    ]
    for title, name in (("load", "load_seconds"), ("load and first token", "first_token_seconds")):
        rows.append([f"{title}, s", *(f"{model[name]:.2f}" for model in models)])
    for title, name in (
        ("peak memory", "peak_memory_bytes"),
        ("  of it Python and its libraries", "library_memory_bytes"),
        ("weights a token needs", "weight_bytes"),
    ):
        rows.append([title, *("-" if model[name] is None else size(model[name]) for model in models)])
    header = [f"tokens/s ({result['dtype']})", *(model["model"] for model in models)]
    return "\n".join([text_table(header, rows, "l" + "r" * len(models)), "", *_remarks(result)])


def _title(case: dict[str, Any]) -> str:
    return f"prefill {case['tokens']}" if case["kind"] == "prefill" else f"decode, batch {case['batch']}"


def _cell(case: dict[str, Any]) -> str:
    """`154 (145-158), 61%, ×1.56 (1.50-1.61)`: the rate, its share, the ratio."""
    rate = case["tokens_per_second"]
    digits = 0 if rate["median"] >= 100 else 1
    text = f"{rate['median']:.{digits}f} ({rate['slowest']:.{digits}f}-{rate['fastest']:.{digits}f})"
    if case["share"] is not None:
        text += f", {case['share']:.0%}"
    if case["ratio"] is not None:
        text += ", ×{median:.2f} ({lowest:.2f}-{highest:.2f})".format(**case["ratio"])
    return text


def _remarks(result: dict[str, Any]) -> list[str]:
    ceilings = result["ceilings"]
    products = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in ceilings["operations_per_second"].items())
    remarks = [
        "Medians (slowest-fastest). Shares: of a decode, the weights' bytes against the memory bandwidth; of a",
        "prefill, the linears' operations against the products. × is against the first model, round by round.",
        f"This machine: reads {ceilings['read_bytes_per_second'] / 1e9:.1f} GB/s; products {products} G operations/s.",
    ]
    return [*remarks, *_held_back(result["models"]), *result["notes"]]


def _held_back(models: list[dict[str, Any]]) -> list[str]:
    """What to know of samples beside a slow calibration: a line a case, or one where it was so of all."""
    from .speed import STEADY

    why = f"held back (calibration below {STEADY:.0%} of the best)"
    lines = [
        f"{model['model']}, {_title(case)}: {held} of {case['taken']} samples were {why}, {used} count."
        for model in models
        for case in model["cases"]
        for held, used in [(case["tokens_per_second"]["held_back"], case["tokens_per_second"]["samples"])]
        if held
    ]
    if all(case["tokens_per_second"]["held_back"] == case["taken"] for model in models for case in model["cases"]):
        return [f"Every sample was {why}, and counts: measure again when the machine is idle."]
    return lines
