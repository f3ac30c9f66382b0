"""`compress`: a recipe run over a checkpoint, from whatever it is given as to a folder with its report.

Reading order: compress -> the checkpoint as a folder of this family -> phases (`Run`) -> the folder -> the measurement.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import processes
from ..checkpoint import (
    CheckpointWriter,
    check_disk_space,
    check_output,
    note_outcome,
    output_folder,
    part_folder,
    take_outcome,
)
from ..checkpoint.bitsandbytes import BitsAndBytes
from ..checkpoint.model_folder import ModelFolder
from ..checkpoint.output import MARKER
from ..convert import convert_checkpoint
from ..convert.source import check_companions, copy_companions
from ..evaluate.clean_process import peak_bytes
from ..model.configuration_llm_kernel import LLMKernelConfig
from .cast import Cast, Precision, is_cast
from .check import check_places, check_run, family_folder, load_tokenizer, read_texts
from .disk import write_json
from .measure import measure
from .plan import plan_stages, stored_sizes
from .recipe import Recipe
from .run import SECONDS_FILE, Run
from .search.plot import plot_searches

# What only an unfinished run needs, inside of the unfinished output.
WORK, RUN_FILE, COMPLETE, SOURCE = "work", "run.json", "complete", "source"
RECORD_FILE = "compression.json"  # of what was decided, beside the weights
SMALL_FILES_BYTES = 64 << 20  # what a tokenizer and the payload take at most


Written = tuple[int, dict[str, Any] | None]


@dataclass(frozen=True)
class Compression:
    """What a run did.

    Args:
        source, output: the checkpoint and the new folder.
        stages: one entry a stage: its settings, under `result` what it reached, once for all layers alike, and under
            `decision` what it decided over all layers.
        notes: what stages told of single layers: `{"layer", "stage", …}`.
        weight_bytes: of all tensors written.
        calibration_tokens: that ran through the model.
        seconds: of the compression, and `seconds_by` what they were spent on; `measure_seconds` come on top.
        peak_memory_bytes: most that this process has had in memory when the compression ended.
        report: the measured report as a dictionary; `None` without an evaluation text.
        precision: what the stage `cast` lost, see `Precision.summary`; `None` without one.
    """

    source: str
    output: str
    stages: list[dict[str, Any]]
    notes: list[dict[str, Any]]
    weight_bytes: int
    calibration_tokens: int
    seconds: float
    seconds_by: dict[str, float] = field(default_factory=dict)
    measure_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    report: dict[str, Any] | None = None
    precision: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def compress(
    model_or_path: Any,
    recipe: Recipe | dict[str, Any] | str | Path,
    output_dir: str | Path,
    tokenizer: Any = None,
    progress: bool = True,
    memory_bytes: int | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Compression:
    """Runs a recipe over a checkpoint and writes a new one that `from_pretrained` loads.

    Interrupted (killed, out of disk), the same call goes on where it was and ends with the same bytes; the seconds of
    all its attempts are added up.

    Under `torchrun`, on one file system, all processes make the same call; each runs its share of the calibration
    samples, and the first writes and measures.

    Args:
        model_or_path: a folder, Hub id or `.gguf` file of this family or of one that `convert_checkpoint` knows, or a
            model in memory.
        recipe: a `Recipe`, its dictionary, or a YAML or JSON file. With an evaluation text, both models are measured
            and the report is written beside the weights.
        output_dir: a new or empty folder; it appears when everything in it is complete.
        tokenizer: for the texts; by default the checkpoint's own. One given is saved with the result.
        progress: whether to show bars on stderr.
        memory_bytes: a model larger than this is not loaded whole to measure its speed; by default what is available.
        finish: is given the folder before it appears, whole but for the report, to write what else belongs in it.

    Raises:
        ValueError: bad input, naming the layer, file or setting and the remedy; nothing is written then.
        OSError: no space.
    """
    check_places(model_or_path, output_dir)
    recipe = Recipe.load(recipe)
    processes.join()
    progress = progress and processes.is_first()
    identity = _identity(model_or_path, recipe)
    if (ended := processes.on_first(lambda: _ended_run(output_dir, identity))) is not None:
        return ended
    check_output(output_dir)
    processes.on_first(lambda: _check_same_run(part_folder(output_dir) / WORK, identity))
    ids = None
    if isinstance(model_or_path, str | Path):
        ids = processes.on_first(lambda: check_run(model_or_path, recipe, tokenizer))
    with _part(output_dir, identity, progress) as folder:
        work = folder / WORK
        source = processes.on_first(lambda: _family_checkpoint(model_or_path, tokenizer, work, progress))
        run = _prepare(source, _name(model_or_path), recipe, tokenizer, ids, work, progress)
        result = run.run()
        written = processes.on_first(lambda: _write_result(result, source, folder, recipe, tokenizer))
        weight_bytes, precision = written
        processes.on_first(lambda: _write_record(run, folder, weight_bytes))
        if finish is not None:
            processes.on_first(lambda: finish(folder))
        (work / COMPLETE).touch()
        peak = peak_bytes()
        names = [_name(model_or_path), Path(output_dir).name]
        started = time.monotonic()
        report = processes.on_first(
            lambda: measure(source, folder, recipe.evaluation, names, progress, memory_bytes)
        )
        measure_seconds = time.monotonic() - started
        compression = Compression(
            source=names[0],
            output=str(output_dir),
            stages=run.outcome(),
            notes=run.notes(),
            weight_bytes=weight_bytes,
            calibration_tokens=run.calibration_tokens,
            seconds=round(sum(run.clock.seconds.values()), 2),
            seconds_by={name: round(value, 2) for name, value in run.clock.seconds.items()},
            measure_seconds=round(measure_seconds, 2) if report else 0.0,
            peak_memory_bytes=peak,
            report=report,
            precision=precision,
        )
        if processes.is_first():
            note_outcome(folder, json.dumps({"run": identity, "compression": compression.to_dict()}))
    return compression


def _write_record(run: Run, folder: Path, weight_bytes: int) -> None:
    """What every stage reached and decided, and what it told of single layers; the same whenever the run is made."""
    record = {
        "stages": run.outcome(),
        "notes": run.notes(),
        "calibration_tokens": run.calibration_tokens,
        "weight_bytes": weight_bytes,
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot_searches(run.outcome(), folder)


def read_record(folder: str | Path) -> dict[str, Any]:
    """What a run has written of itself into its result."""
    return json.loads((Path(folder).expanduser() / RECORD_FILE).read_text(encoding="utf-8"))


def _identity(model_or_path: Any, recipe: Recipe) -> dict[str, Any]:
    """What tells a run from another."""
    return {
        "recipe": recipe.to_dict(),
        "source": _fingerprint(model_or_path),
        "calibration text": _fingerprint(recipe.calibration.source, by_content=True),
    }


def _ended_run(output_dir: str | Path, identity: dict[str, Any]) -> Compression | None:
    """What the same run did, where it was killed when its output was there already."""
    outcome = json.loads(take_outcome(output_dir, WORK) or "{}")
    same = identity["source"] is not None and outcome.get("run") == identity
    return Compression(**outcome["compression"]) if same else None


@contextmanager
def _part(output_dir: str | Path, identity: dict[str, Any], progress: bool) -> Iterator[Path]:
    """The unfinished output, taken up where it is of the same run; the first process makes it and makes it appear."""
    part = nullcontext(part_folder(output_dir))
    with _made_part(output_dir, identity, progress) if processes.is_first() else part as folder:
        processes.wait()
        yield folder
    processes.wait()


@contextmanager
def _made_part(output_dir: str | Path, identity: dict[str, Any], progress: bool) -> Iterator[Path]:
    """The folder, with what tells the run; what another run has left there, who finished nothing, goes.

    It stays where the run was interrupted, or ended by a fault of the machine, after it finished something. Bad input
    would end it again: it goes.
    """
    with output_folder(output_dir, resume=True, scratch=WORK) as folder:
        work = folder / WORK
        if not (work / RUN_FILE).is_file() or identity["source"] is None or _difference(work, identity):
            shutil.rmtree(work, ignore_errors=True)
        elif has_finished(work) and progress:
            print(f"going on with the run that left {folder}", file=sys.stderr)
        work.mkdir(exist_ok=True)
        write_json(work / RUN_FILE, identity)
        try:
            yield folder
        except BaseException as error:
            bad_input = isinstance(error, ValueError) and not (work / COMPLETE).exists()
            if bad_input or not (has_finished(work) or (work / SOURCE).is_dir()):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def has_finished(work: Path) -> bool:
    """Whether a run has finished a block, or the look at one: a JSON file then says so."""
    said = (*work.glob("*.json"), *work.glob("survey-*/**/*.json"), *work.glob("sweep-*/*.json"))
    return any(file.name not in (RUN_FILE, SECONDS_FILE) for file in said)


def _check_same_run(work: Path, identity: dict[str, Any]) -> None:
    """Raises `ValueError` where finished work of another recipe, source or calibration text is in the way."""
    if has_finished(work) and (name := _difference(work, identity)):
        raise ValueError(
            f"output={work.parent}: holds an unfinished run of another {name}; give the same one to go on, or "
            "remove that folder."
        )


def _difference(work: Path, identity: dict[str, Any]) -> str | None:
    """What of a run is another than of the one that left `work`."""
    before = json.loads((work / RUN_FILE).read_text()) if (work / RUN_FILE).is_file() else {}
    told = [name for name in identity if None not in (identity[name], before.get(name))]
    return next((name for name in told if identity[name] != before[name]), None)


def _fingerprint(model_or_path: Any, by_content: bool = False) -> str | None:
    """What tells a checkpoint from another, or a text by its content; `None` for a model in memory.

    A checkpoint may be large: names, sizes and times of its files have to do.
    """
    if not isinstance(model_or_path, str | Path):
        return None
    path = Path(model_or_path).expanduser()
    if not path.exists():
        return str(model_or_path)
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
    stats: list[tuple[Any, ...]] = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if by_content:
        stats = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return hashlib.sha256(repr((str(path.resolve()), stats)).encode()).hexdigest()


def _family_checkpoint(model_or_path: Any, tokenizer: Any, work: Path, progress: bool) -> Path:
    """A folder of this family with the checkpoint; another family's is converted into `work` first."""
    path = model_or_path
    if not isinstance(path, str | Path):
        path = work / "model"
        model_or_path.save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
    own, converted = family_folder(path), work / SOURCE
    if own is None and not converted.is_dir():
        convert_checkpoint(path, converted, progress=progress)
    return own or converted


def _prepare(
    source: Path,
    name: str,
    recipe: Recipe,
    tokenizer: Any,
    ids: torch.Tensor | None,
    work: Path,
    progress: bool,
) -> Run:
    """The run, once everything that can be known before it has been checked; `ids` where they are known already."""
    check_companions(source)
    folder = ModelFolder(source)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else folder.dtype
    plan_stages(folder.config, recipe.stages, dtype, folder.has_head)
    for stage in recipe.stages:
        if isinstance(stage, Cast):
            processes.on_first(lambda stage=stage: stage.check_range(folder.reader))
    if recipe.reads_text and ids is None:
        reads = tokenizer or load_tokenizer(source, name)
        ids = processes.on_first(lambda: read_texts(recipe, reads, folder.config))
    needed = needed_disk_bytes(folder.config, stored_sizes(folder.config, dtype)[1], recipe)
    processes.on_first(lambda: check_disk_space(work, needed - _bytes_of(work)))
    return Run(folder, recipe, dtype, ids, work, progress)


def _bytes_of(folder: Path) -> int:
    """Of the files that an interrupted run has left."""
    return sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file())


def needed_disk_bytes(config: LLMKernelConfig, weight_bytes: int, recipe: Recipe) -> int:
    """Most bytes on disk at once: two sweeps, as if nothing were removed or packed, and activations."""
    widest = max(max(layer.linear_shapes()["down_proj"]) for layer in config.per_layer_config)
    tokens = recipe.calibration.samples * recipe.calibration.length if recipe.needs_data else 0
    activations = tokens * 4 * (3 * config.hidden_size + widest)
    return 2 * weight_bytes + activations + SMALL_FILES_BYTES


def _write_result(result: ModelFolder, source: Path, folder: Path, recipe: Recipe, tokenizer: Any) -> Written:
    """Writes the whole new checkpoint; returns the bytes of its tensors, and what casting them lost."""
    for entry in folder.iterdir():  # of an interrupted attempt
        if entry.is_file() and entry.name != MARKER:
            entry.unlink()
    for stage in recipe.stages:
        stage.plan_whole(result.config)
    written = _write_tensors(result, recipe, folder)
    copy_companions(source, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    result.config.save_pretrained(folder)
    recipe.save(folder / "recipe.yaml")
    return written


def _write_tensors(result: ModelFolder, recipe: Recipe, folder: Path) -> Written:
    """Writes all tensors: cast, and linears as bitsandbytes stores them, where the recipe says so."""
    reader, quantization, layers = result.reader, BitsAndBytes.of(result.config), f"{result.prefix}layers."
    precision = next((Precision(stage) for stage in recipe.stages if isinstance(stage, Cast)), None)
    with CheckpointWriter(folder) as writer:
        for name in reader:
            dtype, shape, blocks = reader.dtype(name), reader.shape(name), reader.blocks(name)
            if precision is not None and is_cast(name, dtype):
                dtype, blocks = getattr(torch, precision.stage.dtype), precision.blocks(name, blocks)
            linear = name.removesuffix(".weight")
            matrix = name.startswith(layers) and linear != name and len(shape) == 2
            if quantization is not None and matrix and quantization.quantizes(linear):
                weight = torch.cat(list(blocks)).view(shape)
                quantization.check_range(linear, weight)
                for suffix, tensor in quantization.encode(weight).items():
                    writer.add(f"{linear}.{suffix}", tensor)
            else:
                writer.add_blocks(name, dtype, shape, blocks)
    if precision is None:
        return writer.total_bytes, None
    write_json(folder / "precision.json", precision.summary())
    return writer.total_bytes, precision.summary()


def _name(model_or_path: Any) -> str:
    return Path(model_or_path).name if isinstance(model_or_path, str | Path) else type(model_or_path).__name__
