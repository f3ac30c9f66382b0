"""Where a model to be measured lies, and how its configuration is read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py")


def model_folder(model: str | Path) -> Path:
    """The folder of a model: the one given, or a snapshot of the Hub's repository of that name.

    Raises:
        ValueError: no folder of a model, or a repository that cannot be had.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model={str(model)!r}: the folder has no config.json; give the folder of a checkpoint.")
        return path
    if path.is_file() or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise ValueError(
            f"model={str(model)!r}: is no folder of a checkpoint; give one, or a Hub name org/name (a GGUF file is "
            "converted first)."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the Hub client raises of many kinds; what matters is that there is no such model here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model={str(model)!r}: is neither a folder nor a repository that the Hub serves ({reason}); check the "
            "name, the connection and the access token."
        ) from error


def model_titles(models: Sequence[Any]) -> list[str]:
    """The last part of each model's path or Hub name, with its parent's where two are alike; a class, in memory."""
    places = [Path(model if isinstance(model, str | Path) else type(model).__name__) for model in models]
    places = [place.resolve() if place.is_dir() else place for place in places]
    names = [place.name for place in places]
    return [
        place.name if names.count(place.name) == 1 else f"{place.parent.name}/{place.name}" for place in places
    ]


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of `config.json`. Raises `ValueError` where it is no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); restore this file.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: is no JSON object; restore this file.")
    return config
