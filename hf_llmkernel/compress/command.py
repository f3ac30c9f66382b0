"""The command `compress`."""

from pathlib import Path
from typing import Annotated, Any

import typer


def compress(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or Hub id of a checkpoint that `convert` knows.")
    ],
    recipe: Annotated[Path, typer.Option(help="Recipe, a .yaml or .json file.")],
    output: Annotated[Path | None, typer.Option(help="New folder to write.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe and print its plan.")] = False,
    memory: Annotated[
        str | None, typer.Option(help="A model larger than this is not loaded whole to time it, as in 8GB.")
    ] = None,
) -> dict[str, Any]:
    """Run a recipe over a checkpoint, block by block; the same command goes on where it was interrupted."""
    if dry_run:
        from .preview import preview

        return preview(model, recipe, output).to_dict()
    if output is None:
        raise ValueError("output: is missing; name the folder to write with --output, or use --dry-run.")
    from ..convert.command import parse_size
    from .pipeline import compress as run

    return run(model, recipe, output, memory_bytes=None if memory is None else parse_size(memory, "memory")).to_dict()


def render_compress(result: dict[str, Any]) -> str:
    """What a run did, or would do, for people."""
    return _render_plan(result) if "sweeps" in result else _render_run(result)


def _render_plan(plan: dict[str, Any]) -> str:
    from ..evaluate.table import count, size, text_table

    rows = [["(source)", count(plan["parameters"]), size(plan["weight_bytes"]), ""]]
    for stage in plan["stages"]:
        about = "about " if stage["estimated"] else ""
        sizes = [f"{about}{count(stage['parameters'])}", f"{about}{size(stage['weight_bytes'])}"]
        expected = "expected: " if stage["estimated"] else ""
        rows.append([stage_name(stage), *sizes, expected + results_text(stage)])
    table = text_table(["stage", "parameters", "weights", "layers"], rows, "lrrl")
    end = (
        f"{plan['sweeps']} walks over the blocks, about {plan['seconds']:.0f} s; memory about "
        f"{size(plan['peak_memory_bytes'])}, disk {size(plan['disk_bytes'])}. Nothing was written."
    )
    return f"{table}\n\n{end}"


def _render_run(result: dict[str, Any]) -> str:
    from ..evaluate import Report
    from ..evaluate.report import columns, render_reports
    from ..evaluate.table import size

    lines = [stage_line(stage) for stage in result["stages"]]
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds_by"].items())
    written = size(result["weight_bytes"])
    memory = size(result["peak_memory_bytes"])
    lines.append(f"{result['output']}: {written} of weights in {result['seconds']:.0f} s ({spent}), {memory} of memory")
    if fallbacks := [note for note in result["notes"] if "dampening" in note]:
        lines.append(f"dampening was raised in {len(fallbacks)} solves, the first in layer {fallbacks[0]['layer']}")
    lines += underflow_lines(result["notes"])
    if lost := result["precision"]:
        counts = ", ".join(f"{lost[kind]} {kind}" for kind in ("overflowed", "underflowed", "subnormal"))
        lines.append(f"{lost['dtype']}: of {lost['values']} values {counts}; by tensor in precision.json")
    report = [render_reports(columns(Report.from_dict(result["report"])))] if result["report"] else []
    return "\n\n".join(["\n".join(lines), *report])


def underflow_lines(notes: list[dict[str, Any]]) -> list[str]:
    """How many values a quantization made zero, as their groups would need smaller scales than there are."""
    found = [note for note in notes if "underflowed" in note]
    if not found:
        return []
    first, count = found[0], sum(note["underflowed"] for note in found)
    return [
        f"{first['stage']}: {count} values became zero, as {first['scale_dtype']} has no scale so small, the first in "
        f"layer {first['layer']}, {first['matrix']}; scale_dtype bfloat16 has"
    ]


def stage_line(stage: dict[str, Any]) -> str:
    """What a stage decided and reached."""
    return f"{stage_name(stage)}: {decided(stage)}{results_text(stage)}"


def results_text(stage: dict[str, Any]) -> str:
    """All that a stage reached, the embedding and the head too, which no layer's result names."""
    ends = stage[stage_name(stage)].get("embeddings")
    results = [result for result in stage["result"] if not (ends and result.get("matrices") == [])]
    return "; ".join([*map(result_text, results), *(["embedding and head"] if ends else [])])


def decided(stage: dict[str, Any]) -> str:
    """What a stage dropped, by the numbers that the layers had before."""
    dropped = stage.get("decision", {}).get("dropped", [])
    parts: dict[str, list[int]] = {}
    for index, part in dropped:
        parts.setdefault(part, []).append(index)
    return "".join(f"dropped {part} {ranges(sorted(indices))}; " for part, indices in parts.items())


def stage_name(stage: dict[str, Any]) -> str:
    """The recipe name of a stage's entry."""
    return next(key for key, value in stage.items() if isinstance(value, dict) and key != "decision")


def result_text(result: dict[str, Any]) -> str:
    """One variant of what a stage reached: `layers 0-29: neurons 1344, …`."""
    facts = [f"{key} {_value(value)}" for key, value in result.items() if key not in ("layers", "matrices", "each")]
    facts += _own_facts(result.get("each", {}))
    names = result.get("matrices", [])
    return f"layers {ranges(result['layers'])}: {', '.join([*facts, ' '.join(names)] if names else facts)}"


def _own_facts(each: dict[str, dict[str, Any]]) -> list[str]:
    """What matrices of a layer do not share: `last_group_size 76 (q_proj k_proj)`."""
    owners: dict[str, list[str]] = {}
    for name, own in each.items():
        for key, value in own.items():
            owners.setdefault(f"{key} {_value(value)}", []).append(name)
    return [f"{fact} ({' '.join(names)})" for fact, names in owners.items()]


def ranges(numbers: list[int]) -> str:
    """Ascending numbers with runs as `0-4`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{key}:{_value(entry)}" for key, entry in value.items())
    return str(value)
