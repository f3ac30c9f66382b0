"""Recipes: what to do to a checkpoint, in YAML, JSON, a dictionary, or these dataclasses."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import methods
from .registry import from_fields, stage_from_dict
from .stage import Stage

DTYPES = ("float32", "bfloat16", "float16")
CONTEXT = 1024  # tokens of a window of evaluation


@dataclass(frozen=True)
class Calibration:
    """Text that runs through the model for stages that look at its activations.

    Args:
        source: what `load_documents` knows: a built-in name, a text file, a folder, or a set of `datasets`. Documents
            that evaluation would take (`split_documents`) are withheld.
        samples, length: number of packed sequences, and tokens in each.
        seed: of their choice.
    """

    source: str | None = None
    samples: int = 64
    length: int = 512
    seed: int = 0

    def __post_init__(self):
        _check_source(self.source)
        _check_counts(self, samples=1, length=1, seed=0)


@dataclass(frozen=True)
class Evaluation:
    """What the result is measured on, beside the model it came from; without a source nothing is measured.

    Args:
        source: as in `Calibration`; perplexity is measured on the documents that calibration does not take.
        context: tokens of a window; by default 1024, or the model's positions where these are fewer.
        tokens: of all windows.
        prompt: what both models answer as a sample.
        speed: whether to measure speed and memory too, where both models fit in memory.
    """

    source: str | None = None
    context: int | None = None
    tokens: int = 8192
    prompt: str = "Explain in two sentences why the sky is blue."
    speed: bool = True

    def __post_init__(self):
        _check_source(self.source)
        _check_counts(self, tokens=2, **({} if self.context is None else {"context": 2}))
        if not isinstance(self.prompt, str) or not self.prompt:
            raise ValueError(f"prompt={self.prompt!r}: must be a text.")
        if not isinstance(self.speed, bool):
            raise ValueError(f"speed={self.speed!r}: must be true or false.")

    def window(self, positions: int) -> int:
        """Tokens of a window on a model of so many positions."""
        return min(CONTEXT, positions) if self.context is None else self.context


@dataclass(frozen=True)
class Recipe:
    """Stages in the order in which they work on each block, and what they need.

    Args:
        stages: instances of the stages' dataclasses, or `{name: settings}` dictionaries.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, of what stays floating; by default the source's.
        calibration, evaluation: see their classes.

    Raises:
        ValueError: a setting outside its range, or an unknown key or stage; the known ones are named.
    """

    stages: tuple[Stage, ...]
    dtype: str | None = None
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self):
        if not isinstance(self.stages, list | tuple) or not self.stages:
            raise ValueError(f"stages={self.stages!r}: must be a list of at least one stage.")
        stages = tuple(stage if isinstance(stage, Stage) else stage_from_dict(stage) for stage in self.stages)
        object.__setattr__(self, "stages", stages)
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype={self.dtype!r}: must be one of {list(DTYPES)}; null keeps the source's.")
        for name, kind in (("calibration", Calibration), ("evaluation", Evaluation)):
            if not isinstance(getattr(self, name), kind):
                object.__setattr__(self, name, from_fields(kind, getattr(self, name), name))
        if self.needs_data and self.calibration.source is None:
            names = [stage.name for stage in self.stages if stage.needs_data]
            raise ValueError(f"calibration.source=null: {names[0]} looks at activations; name a text for it.")

    @property
    def needs_data(self) -> bool:
        """Whether any stage needs calibration."""
        return any(stage.needs_data for stage in self.stages)

    @property
    def reads_text(self) -> bool:
        """Whether texts are read, for calibration or evaluation."""
        return self.needs_data or self.evaluation.source is not None

    @classmethod
    def load(cls, recipe: "Recipe | dict[str, Any] | str | Path") -> "Recipe":
        """A recipe from a `.yaml`, `.yml` or `.json` file or a dictionary.

        Raises:
            ValueError: a file that is missing or cannot be read, or as the class says.
        """
        if isinstance(recipe, cls):
            return recipe
        if isinstance(recipe, str | Path):
            return cls._of_table(_read(Path(recipe)), str(recipe))
        return cls._of_table(recipe, "recipe")

    @classmethod
    def _of_table(cls, table: Any, where: str) -> "Recipe":
        if isinstance(table, list):
            raise ValueError(f"{where}: is a list; a recipe is a table, with the list of its stages under `stages:`.")
        return from_fields(cls, table, where)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that `load` reads back to an equal recipe, every default written out."""
        return {
            "dtype": self.dtype,
            "calibration": asdict(self.calibration),
            "evaluation": asdict(self.evaluation),
            "stages": [stage.to_dict() for stage in self.stages],
        }

    def save(self, path: str | Path) -> None:
        """Writes it as YAML."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")


def _read(path: Path) -> Any:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"recipe={path}: must be a .yaml, .yml or .json file.")
    if not path.is_file():
        raise ValueError(f"recipe={path}: there is no such file; check the path.")
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"recipe={path}: cannot be read ({reason}); correct the file.") from None


def _check_source(source: Any) -> None:
    if source is not None and (not isinstance(source, str) or not source):
        raise ValueError(f"source={source!r}: must name a text, as in 'bbc' or a path.")


def _check_counts(settings: Any, **least: int) -> None:
    for name, minimum in least.items():
        value = getattr(settings, name)
        if type(value) is not int or value < minimum:
            raise ValueError(f"{name}={value!r}: must be an integer of at least {minimum}.")


__all__ = ["Calibration", "Evaluation", "Recipe", "methods"]
