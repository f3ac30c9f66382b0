"""`compress`: a recipe run over a checkpoint, from whatever it is given as to a folder with its report.

Reading order: compress -> the checkpoint as a folder of this family -> the sweep (`sweep.py`) -> the measurement.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import check_output, output_folder
from ..convert import convert_checkpoint
from ..convert.incoming import read_config_fields
from ..convert.source import copy_companions, locate_source
from ..model.configuration_llm_kernel import LLMKernelConfig
from .measure import check_evaluation, measure
from .recipe import Recipe
from .sweep import Sweep


@dataclass(frozen=True)
class Compression:
    """What a run did.

    Args:
        source, output: the checkpoint and the new folder.
        stages: one entry a stage: its settings, and under `result` what it reached, once for all layers alike.
        weight_bytes: of all tensors written.
        calibration_tokens: that ran through the model.
        seconds: of the compression, and `forward_seconds` of it in calibration forwards; `measure_seconds` come on top.
        report: the measured report as a dictionary; `None` without an evaluation text.
    """

    source: str
    output: str
    stages: list[dict[str, Any]]
    weight_bytes: int
    calibration_tokens: int
    seconds: float
    forward_seconds: float
    measure_seconds: float = 0.0
    report: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def compress(
    model_or_path: Any,
    recipe: Recipe | dict[str, Any] | str | Path,
    output_dir: str | Path,
    tokenizer: Any = None,
    progress: bool = True,
) -> Compression:
    """Runs a recipe over a checkpoint and writes a new one that `from_pretrained` loads.

    Args:
        model_or_path: a folder, Hub id or `.gguf` file of this family or of one that `convert_checkpoint` knows, or a
            model in memory.
        recipe: a `Recipe`, its dictionary, or a YAML or JSON file. With an evaluation text, both models are measured
            and the report is written beside the weights.
        output_dir: a new or empty folder; it appears when everything in it is complete.
        tokenizer: for the texts; by default the checkpoint's own. One given is saved with the result.
        progress: whether to show bars on stderr.

    Raises:
        ValueError: bad input, naming the layer, file or setting and the remedy; nothing is written then.
        OSError: no space.
    """
    recipe = Recipe.load(recipe)
    check_output(output_dir)
    with output_folder(output_dir) as folder, _family_checkpoint(model_or_path, tokenizer, folder, progress) as source:
        started = time.monotonic()
        sweep = _compress_folder(source, folder, recipe, tokenizer, progress)
        compressed = time.monotonic()
        names = [_name(model_or_path), Path(output_dir).name]
        report = measure(source, folder, recipe.evaluation, names, progress) if recipe.evaluation.source else None
        measured = time.monotonic()
    return Compression(
        source=_name(model_or_path),
        output=str(output_dir),
        stages=sweep.outcome,
        weight_bytes=sweep.weight_bytes,
        calibration_tokens=sweep.calibration_tokens,
        seconds=round(compressed - started, 2),
        forward_seconds=round(sweep.forward_seconds, 2),
        measure_seconds=round(measured - compressed, 2) if report else 0.0,
        report=report,
    )


def _compress_folder(source: Path, folder: Path, recipe: Recipe, tokenizer: Any, progress: bool) -> Sweep:
    """Writes the whole new checkpoint; what cannot be is found out before the sweep."""
    reads = (tokenizer or load_tokenizer(source)) if recipe.needs_data or recipe.evaluation.source else None
    sweep = Sweep(source, folder, recipe, reads)
    if recipe.evaluation.source:
        check_evaluation(recipe.evaluation, reads, sweep.config)
    config = sweep.run(progress)
    copy_companions(source, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    recipe.save(folder / "recipe.yaml")
    return sweep


def _name(model_or_path: Any) -> str:
    return Path(model_or_path).name if isinstance(model_or_path, str | Path) else type(model_or_path).__name__


@contextmanager
def _family_checkpoint(model_or_path: Any, tokenizer: Any, folder: Path, progress: bool) -> Iterator[Path]:
    """A folder of this family with the checkpoint; another family's is converted into a scratch folder."""
    with tempfile.TemporaryDirectory(prefix="source-", dir=folder) as scratch:
        path = model_or_path
        if not isinstance(path, str | Path):
            path = Path(scratch) / "model"
            model_or_path.save_pretrained(path)
            if tokenizer is not None:
                tokenizer.save_pretrained(path)
        own = family_folder(path)
        if own is None:
            own = Path(scratch) / "converted"
            convert_checkpoint(path, own, progress=progress)
        yield own


def family_folder(source: str | Path) -> Path | None:
    """The folder of a checkpoint (folder, `.gguf` file or Hub id) that is of this family already, else `None`."""
    found = locate_source(source)
    if found.gguf is not None:
        return None
    fields = read_config_fields(found.folder / "config.json")
    return found.folder if fields.get("model_type") == LLMKernelConfig.model_type else None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder. Raises `ValueError` where none loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a tokenizer may run any code of any package
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder}: its tokenizer does not load ({reason}), and the texts of the recipe need one; pass a tokenizer."
        ) from None
