"""What Optimum's conventions ask of every config and quantizer: a config that is saved beside the model it made.

A config stands for a recipe of one stage; a ready recipe may take its place.
"""

from typing import Any, Self

from optimum.configuration_utils import BaseConfig
from optimum.quantization_base import OptimumQuantizer

from ..convert.source import locate_source
from .recipe import Recipe

# What the base class writes beside a config's own entries.
STAMPS = ("model_type", "transformers_version", "optimum_version")
# Configs of other tools name them to be left alone, which they are.
NEVER_CHOSEN = ("lm_head", "embed_tokens")


class RecipeConfig(BaseConfig):
    """A config that stands for a recipe; what it can ask for are the annotated names of its class.

    Args:
        op_names: names or globs of the linears it works on (`q_proj`, `mlp.*`); by default all.
        excluded_op_names: those to leave out.
        layers: `[first, end]`, the layers it works on, `end` left out; by default all.
        dtype, calibration, evaluation: as in a `Recipe`; tables.
        recipe: a ready `Recipe` or its table, in place of all of these.

    Raises:
        ValueError: an unknown name or a setting outside its range, with the remedy.
    """

    # Not annotated, for these are no entries: what it is called in messages, and names filled in when it is done.
    kind = "config"
    measured = ()

    def __post_init__(self, **unknown: Any):
        if names := sorted(set(unknown) - set(STAMPS)):
            raise ValueError(f"{self.kind}: unknown names {names}; the known ones are {self.setting_names()}.")
        dtype, self.dtype = self.dtype, None
        super().__post_init__()
        self.dtype = dtype  # a name; the base class would make it torch's, or end where torch has none such
        if isinstance(self.recipe, Recipe):
            self.recipe = self.recipe.to_dict()
        self._check_recipe()
        self._check()
        self.to_recipe()

    @classmethod
    def setting_names(cls) -> list[str]:
        """Names of what it can ask for."""
        return [name for name in cls.__annotations__ if name not in cls.measured]

    @classmethod
    def read(cls, given: Any) -> Self:
        """A config of one, of a recipe, or of the table of either."""
        if isinstance(given, cls):
            return given
        if isinstance(given, Recipe) or (isinstance(given, dict) and "stages" in given):
            given = {"recipe": Recipe.load(given)}
        if isinstance(given, dict):
            return cls(**given)
        name = cls.kind.replace(" ", "_")
        raise ValueError(f"{name}={given!r}: must be an {cls.__name__}, a Recipe, or the table of either.")

    def to_recipe(self) -> Recipe:
        """The recipe it stands for."""
        if self.recipe is not None:
            return Recipe.load(self.recipe)
        return Recipe.load(
            {
                "dtype": self.dtype,
                "calibration": self.calibration or {},
                "evaluation": self.evaluation or {},
                "stages": [{self._stage_name(): self._stage_settings()}],
            }
        )

    def with_measured(self, **reached: Any) -> Self:
        """The same with what was reached."""
        return type(self)(**{name: getattr(self, name) for name in self.setting_names()}, **reached)

    def _stage_name(self) -> str:
        raise NotImplementedError

    def _stage_settings(self) -> dict[str, Any]:
        """Settings of that stage."""
        raise NotImplementedError

    def _check(self) -> None:
        """Raises `ValueError` for settings that the stage does not check itself."""

    def _chosen_linears(self) -> dict[str, Any]:
        excluded = [name for name in self.excluded_op_names or () if name not in NEVER_CHOSEN]
        return {"include": self.op_names, "exclude": excluded}

    def _check_recipe(self) -> None:
        names = [name for name in self.setting_names() if name != "recipe"]
        given = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        if self.recipe is not None and given:
            raise ValueError(f"recipe: says all there is, but {given} are given too; leave one or the other out.")

    def _check_names(self) -> None:
        for name in ("op_names", "excluded_op_names"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, list | tuple) and all(isinstance(op, str) for op in value)):
                raise ValueError(f"{name}={value!r}: must be a list of names or globs, such as ['q_proj', 'mlp.*'].")
        if self.op_names is not None and not self.op_names:
            raise ValueError("op_names=[]: leaves no linear to work on; leave it out for all.")

    def to_dict(self) -> dict[str, Any]:
        """Its own entries and the versions, without what the base class holds for models."""
        stamps = super().to_dict()
        versions = {name: stamps[name] for name in STAMPS if name in stamps and name != "model_type"}
        return {**{name: getattr(self, name) for name in (*self.setting_names(), *self.measured)}, **versions}

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it, for defaults may change."""
        return self.to_dict()


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that are not `None`, which stands for a stage's default."""
    return {name: value for name, value in settings.items() if value is not None}


class CheckpointQuantizer(OptimumQuantizer):
    """Works on a checkpoint of this family, or of one that `convert_checkpoint` knows, block by block.

    Args:
        model_or_path: a folder, Hub id or `.gguf` file, or a model in memory.
        tokenizer: for the texts of calibration and evaluation; by default the checkpoint's own.
    """

    def __init__(self, model_or_path: Any, tokenizer: Any = None):
        self.model_or_path = model_or_path
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, model_or_path: Any, file_name: str | None = None, tokenizer: Any = None) -> Self:
        """One for a checkpoint; nothing of it is loaded before the work begins.

        Args:
            model_or_path, tokenizer: as the class takes them.
            file_name: of a GGUF file in that folder or repository.

        Raises:
            ValueError: a GGUF file that is not there.
        """
        if file_name is not None:
            model_or_path = locate_source(model_or_path, gguf_file=file_name).gguf
        return cls(model_or_path, tokenizer)

    @staticmethod
    def check_file_prefix(file_prefix: str | None) -> None:
        """Raises `ValueError` for a prefix of file names, which the base class has and `from_pretrained` does not."""
        if file_prefix is not None:
            raise ValueError(f"file_prefix={file_prefix!r}: the files have fixed names; leave it out.")
