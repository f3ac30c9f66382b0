"""The model card of a checkpoint: the template `model_card.md`, filled from its files and its report.

Reading order: `write_model_card` -> what fills each place of the template, in the template's order.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from ..evaluate import Inventory

# By the end of the architecture's name: its pipeline, and the Auto class that loads it.
TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "Model": ("feature-extraction", "AutoModel"),
}
NO_REPORT = "no report was made for this model"


def write_model_card(
    folder: str | Path,
    report: dict[str, Any] | None,
    base_model: str | None = None,
    *,
    license: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Writes `README.md`, the model card, into a checkpoint folder; one that is there is replaced.

    Args:
        folder: holds `config.json` and the weights; `recipe.yaml`, where there is one, is quoted.
        report: what `report.json` holds for this model, its `baseline` in it; `None` where nothing was measured.
        base_model: Hub name of the model this one was made from; of a folder only its name is told.
        license: identifier as the Hub writes it, such as `apache-2.0`.
        repo_id: name under which the model will be loaded; by default the folder's.

    Raises:
        ValueError: a folder without a model of this family, or with files that contradict each other; a report of
            several models.
    """
    from ..evaluate import inspect

    folder = Path(folder)
    config = _read_config(folder)
    report = report or {}
    if "models" in report:
        raise ValueError(f"report: is of {len(report['models'])} models; give that of the one in {str(folder)!r}.")
    base = _base_model(base_model)
    facts = {
        **_identity(config, repo_id or folder.resolve().name, base, license),
        **_stored(inspect(folder, progress=False)),
        "measured": _measured(report),
        "sample": _sample(report),
        "how_made": _how_made(folder, base),
        "how_measured": _how_measured(report),
    }
    card = folder / "README.md"
    card.write_text(Template(read_template()).substitute(facts), encoding="utf-8")
    return card


def read_template() -> str:
    """The template: beside this file in an installed wheel, at the top of a checkout."""
    packaged = files("hf_llmkernel.publish") / "model_card.md"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).parents[2] / "model_card.md").read_text(encoding="utf-8")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("model_type") != "llm_kernel":
        raise ValueError(
            f"folder={str(folder)!r}: config.json is missing or of another family; name a folder that "
            "`llmkernel convert` or a save_pretrained of this family wrote."
        )
    return config


@dataclass(frozen=True)
class BaseModel:
    """What a model was made from: how the text calls it, and its Hub name where it has one."""

    text: str = "a model that is not named here"
    hub_name: str | None = None


def _base_model(name: str | None) -> BaseModel:
    if not name:
        return BaseModel()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return BaseModel(f"[{name}](https://huggingface.co/{name})", name)
    return BaseModel(f"`{Path(name).name}`")


def _identity(config: dict[str, Any], name: str, base: BaseModel, license: str | None) -> dict[str, str]:
    """What follows from the architecture and the names alone."""
    pipeline_tag, auto_class = _task(config)
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": pipeline_tag,
        "license": license,
        "base_model": base.hub_name,
        "tags": ["llm_kernel", "custom_code"],
    }
    shape = f"{config['num_hidden_layers']} layers of width {config['hidden_size']}"
    unstated = (
        f"Not stated in the files this card was made from; the terms of what it was made from, {base.text}, hold."
    )
    return {
        "metadata": yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False).strip(),
        "name": name.rpartition("/")[2],
        "shape": shape,
        "base": base.text,
        "load_with_package": _snippet(name, pipeline_tag, auto_class, trust=False),
        "load_without_package": _snippet(name, pipeline_tag, auto_class, trust=True),
        "intended_use": INTENDED_USE[pipeline_tag],
        "license": f"Of the weights: {license}." if license else unstated,
    }


INTENDED_USE = {
    "text-generation": "Generating text, and measuring how far a model can be compressed. What it writes may be wrong.",
    "text-classification": "Classifying texts, with the labels and the kind of text it was trained on.",
    "token-classification": "Labelling the tokens of texts of the kind it was trained on.",
    "question-answering": "Finding the answer to a question inside a text that holds it.",
    "feature-extraction": "Hidden states for further models; it has no head of its own.",
}


def _task(config: dict[str, Any]) -> tuple[str, str]:
    architecture = (config.get("architectures") or ["LLMKernelModel"])[0]
    return next(task for ending, task in TASKS.items() if architecture.endswith(ending))


def _snippet(name: str, pipeline_tag: str, auto_class: str, trust: bool) -> str:
    code = ", trust_remote_code=True" if trust else ""
    lines = [
        f"from transformers import {auto_class}, AutoTokenizer" + (", pipeline" if _has_pipeline(pipeline_tag) else ""),
        "",
        f'model = {auto_class}.from_pretrained("{name}"{code})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
    if _has_pipeline(pipeline_tag):
        lines.append(f'pipe = pipeline("{pipeline_tag}", model=model, tokenizer=tokenizer)')
    return "\n".join(lines)


def _has_pipeline(pipeline_tag: str) -> bool:
    return pipeline_tag != "question-answering"  # transformers 5 has no such pipeline any more


def _stored(inventory: "Inventory") -> dict[str, str]:
    """Totals and the table of forms, counted from the weight files themselves."""
    size = inventory.bytes if inventory.bytes_on_disk is None else inventory.bytes_on_disk
    totals = f"{inventory.parameters:,} values in {megabytes(size)}"
    if inventory.dense_parameters != inventory.parameters:
        totals += f"; with every linear dense, these shapes have {inventory.dense_parameters:,}"
    groups: dict[str, list] = {}
    for entry in inventory.entries:
        groups.setdefault(entry.form, []).append(entry)
    rows = [_form_row(form, entries) for form, entries in groups.items()]
    header = ["form", "modules", "which", "values stored", "values if dense", "bytes"]
    integers = any(re.search(r"\bint[48]\b", form) for form in groups)
    return {
        "what_is_stored": f"{totals}.",
        "forms": table(header, rows, "lrlrrr"),
        "training": INTEGERS_ARE_FIXED if integers else ALL_CAN_BE_TRAINED,
    }


INTEGERS_ARE_FIXED = (
    "Its integer weights are fixed: train adapters on top of them (`peft`), or the dense model before compression."
)
ALL_CAN_BE_TRAINED = "Every value it stores takes a gradient: it can be trained further as it is."


def _form_row(form: str, entries: list) -> list[str]:
    names = sorted({entry.name.rpartition(".")[2] for entry in entries})
    return [
        form,
        str(len(entries)),
        ", ".join(f"`{name}`" for name in names),
        f"{sum(entry.parameters for entry in entries):,}",
        f"{sum(entry.dense_parameters for entry in entries):,}",
        megabytes(sum(entry.bytes for entry in entries)),
    ]


def _measured(report: dict[str, Any]) -> str:
    """The table of figures, one column for this model and one for its baseline; what is missing says why."""
    baseline = report.get("baseline")
    columns = [report] if baseline is None else [baseline, report]
    header = ["", *(str(column.get("model", "this model")) for column in columns)]
    rows = [[title, *(_figure(key, column) for column in columns)] for title, key in _titles(report)]
    return table(header, rows, "l" + "r" * len(columns))


def _titles(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Titles with the conditions of each figure, and its key in a report."""
    quality = "perplexity"
    if report.get("tokens_evaluated"):
        quality += (
            f" ({report['tokens_evaluated']:,} tokens of {report.get('text')}, context {report['context_length']})"
        )
    speed = f"tokens/s ({report['dtype']})" if report.get("dtype") else "tokens/s"
    return [
        ("parameters stored", "parameters"),
        ("bytes on disk", "bytes_on_disk"),
        (quality, "perplexity"),
        (f"decode, {speed}", "decode_tokens_per_second"),
        (f"prefill, {speed}", "prefill_tokens_per_second"),
        ("peak memory", "peak_memory_bytes"),
    ]


def _figure(key: str, report: dict[str, Any]) -> str:
    value = report.get(key)
    if value is None:
        return f"not measured: {report.get('reasons', {}).get(key, NO_REPORT if not report else 'not asked for')}"
    if key in ("bytes_on_disk", "peak_memory_bytes"):
        return megabytes(value)
    if key == "perplexity" and report.get("perplexity_standard_error"):
        return f"{value:,.2f} ± {report['perplexity_standard_error']:,.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _sample(report: dict[str, Any]) -> str:
    sample = report.get("sample")
    if sample is None:
        return f"No sample of its text: {report.get('reasons', {}).get('sample', NO_REPORT)}."
    quoted = "\n".join(f"> {line}".rstrip() for line in str(sample["text"]).strip().splitlines())
    return f'A greedy answer to "{sample["prompt"]}":\n\n{quoted}'


def _how_made(folder: Path, base: BaseModel) -> str:
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        return (
            f"By `llmkernel compress`, with this recipe:\n\n```yaml\n{recipe.read_text(encoding='utf-8').strip()}\n```"
        )
    return f"No recipe lies beside the weights: made from {base.text}, they are stored as the table above shows."


def _how_measured(report: dict[str, Any]) -> str:
    if not report:
        return f"Not measured: {NO_REPORT}; `llmkernel evaluate` makes one."
    sentences = [_quality_method(report), _speed_method(report), _machine(report)]
    return "\n\n".join(sentence for sentence in sentences if sentence)


def _quality_method(report: dict[str, Any]) -> str:
    if report.get("perplexity") is None:
        return f"Perplexity {_figure('perplexity', report)}."
    return (
        f"Perplexity: {report['tokens_evaluated']:,} tokens of `{report.get('text')}` in windows of "
        f"{report['context_length']} that do not overlap, in fp32, from documents withheld from calibration."
    )


def _speed_method(report: dict[str, Any]) -> str:
    if report.get("decode_tokens_per_second") is None:
        return f"Speed {_figure('decode_tokens_per_second', report)}."
    settings = ", ".join(f"{name} {value}" for name, value in (report.get("settings") or {}).items())
    return (
        f"Speed: medians of several rounds in a clean process, batch 1, {report.get('dtype')} ({settings}). Peak "
        "memory is the most that this process held resident while it loaded, prefilled and decoded."
    )


def _machine(report: dict[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in (report.get("machine") or {}).items())
    versions = ", ".join(f"{name} {value}" for name, value in (report.get("versions") or {}).items())
    return f"Machine: {machine or 'not recorded'}. Versions: {versions or 'not recorded'}."


def megabytes(value: int) -> str:
    """Bytes in decimal megabytes, exact where smaller than one."""
    return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value:,} bytes"


def table(header: list[str], rows: Iterable[list[str]], align: str) -> str:
    """A Markdown table; `align` has a letter a column, `l` or `r`."""
    marks = ["---:" if side == "r" else "---" for side in align]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, marks, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
