"""Stages by their recipe name: a method's file registers its dataclass, `methods` imports that file."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

T = TypeVar("T")
STAGES: dict[str, type] = {}


def register(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: makes a stage known under `name` in recipes."""

    def add(stage: type[T]) -> type[T]:
        if STAGES.setdefault(name, stage) is not stage:
            raise ValueError(f"stage={name}: registered twice, by {STAGES[name]} and {stage}; rename one.")
        stage.name = name  # type: ignore[attr-defined]
        return stage

    return add


def from_fields(kind: type[T], values: Any, where: str) -> T:
    """A dataclass from a table of a recipe. Raises `ValueError` on an unknown key, naming the known ones."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}={values!r}: must be a table of settings; write {{}} for none.")
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(map(str, set(values) - set(known))):
        raise ValueError(f"{where}: unknown keys {unknown}; the known ones are {known}.")
    for name in _required(kind):
        if name not in values:
            raise ValueError(f"{where}: {name} is missing; it has no default.")
    for field in fields(kind):  # type: ignore[arg-type]
        if field.type in (str, str | None) and isinstance(values.get(field.name), list | dict):
            raise ValueError(f"{where}: {field.name}={values[field.name]!r}: must be one text.")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _required(kind: type) -> list[str]:
    """Names of the settings without a default."""
    return [
        field.name
        for field in fields(kind)  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING
    ]


def stage_from_dict(entry: Any) -> Any:
    """A stage from `{name: settings}`. Raises `ValueError` on an unknown name, naming the known ones."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError(f"stages: {entry!r} must be one name with its settings, as in {{quantize: {{bits: 8}}}}.")
    ((name, settings),) = entry.items()
    if name not in STAGES:
        raise ValueError(f"stages: unknown stage {name!r}; the known ones are {sorted(STAGES)}.")
    return from_fields(STAGES[name], {} if settings is None else settings, name)
