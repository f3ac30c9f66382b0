"""What a run is given, checked before anything is written: where it is, its shapes, its stages, its texts.

Shapes: S samples, T tokens a sample.
"""

from pathlib import Path
from typing import Any, cast

import torch

from ..checkpoint import check_output
from ..checkpoint.model_folder import ModelFolder
from ..checkpoint.output import MARKER
from ..convert.incoming import converted_config, read_config_fields
from ..convert.source import HUB_ID, check_companions, locate_source
from ..model.configuration_llm_kernel import LLMKernelConfig
from .calibration import calibration_ids
from .measure import check_evaluation
from .plan import plan_stages
from .recipe import Recipe


def check_places(model_or_path: Any, output_dir: str | Path) -> None:
    """Raises `ValueError` for a source that is not here and can be no Hub id, or for an output in the way.

    An output with the mark of a run that was killed as it ended is left to that run.
    """
    if isinstance(model_or_path, str | Path):
        path = Path(model_or_path).expanduser()
        if path.exists() or not HUB_ID.fullmatch(str(model_or_path)):
            locate_source(model_or_path)
    elif not hasattr(model_or_path, "save_pretrained"):
        raise ValueError(f"model={model_or_path!r}: must be a folder, a .gguf file, a Hub id, or a loaded model.")
    if not (Path(output_dir).expanduser() / MARKER).is_file():
        check_output(output_dir)


def check_run(model: str | Path, recipe: Recipe, tokenizer: Any = None) -> torch.Tensor | None:
    """Checks a recipe against a checkpoint and its texts.

    Returns:
        Calibration tokens int64 `[S, T]`, where there are any and the tokenizer is known before a conversion.

    Raises:
        ValueError: a source that is not there or not known, a stage that it cannot have, a text that will not do.
    """
    config, dtype, has_head = source_shapes(model, recipe)
    plan_stages(config, recipe.stages, dtype, has_head)
    return source_texts(model, recipe, config, tokenizer)


def source_shapes(model: str | Path, recipe: Recipe) -> tuple[LLMKernelConfig, torch.dtype, bool]:
    """Configuration, dtype of the result, and whether there is a language-model head."""
    own = family_folder(model)
    if own is not None:
        folder = ModelFolder(own)
        config, dtype, has_head = folder.config, folder.dtype, folder.has_head
    else:
        config, has_head = converted_config(model)
        dtype = cast(torch.dtype, config.dtype)
    return config, getattr(torch, recipe.dtype) if recipe.dtype else dtype, has_head


def source_texts(
    model: str | Path, recipe: Recipe, config: LLMKernelConfig, tokenizer: Any = None
) -> torch.Tensor | None:
    """Reads the recipe's texts as the run does; a GGUF file's tokenizer is known once it is converted."""
    found = locate_source(model)
    if found.gguf is None:
        check_companions(found.folder)
    if not recipe.reads_text or (tokenizer is None and found.gguf is not None):
        return None
    return read_texts(recipe, tokenizer or load_tokenizer(found.folder, str(model)), config)


def family_folder(source: str | Path) -> Path | None:
    """The folder of a checkpoint (folder, `.gguf` file or Hub id) that is of this family already, else `None`."""
    found = locate_source(source)
    if found.gguf is not None:
        return None
    fields = read_config_fields(found.folder / "config.json")
    return found.folder if fields.get("model_type") == LLMKernelConfig.model_type else None


def read_texts(recipe: Recipe, tokenizer: Any, config: LLMKernelConfig) -> torch.Tensor | None:
    """Calibration tokens `[S, T]` where a stage asks for them. Raises `ValueError` where a text will not do."""
    ids = calibration_ids(recipe.calibration, tokenizer, config) if recipe.needs_data else None
    if recipe.evaluation.source:
        check_evaluation(recipe.evaluation, tokenizer, config)
    return ids


def load_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer in a folder of the model `name`. Raises `ValueError` where none loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a tokenizer may run any code of any package
        reason = " ".join(str(error).replace(str(folder), name).split())[:200]
        raise ValueError(
            f"{name}: its tokenizer does not load ({reason}), and the texts of the recipe need one; put its files "
            "beside the weights, or in Python pass a tokenizer."
        ) from None
