"""Where a checkpoint comes from (a folder, a GGUF file, or the Hub), and the files that travel with its weights."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from transformers import GenerationConfig

from .families import SHARED, one_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# Carried over byte for byte: tokenizer, chat templates, generation defaults, and the terms of use.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    *TERMS,
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
# A hub folder often holds the same weights again, in formats that are not read here.
HUB_IGNORED = ("original/*", "consolidated*", "*/*.safetensors", "onnx/*")


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine: its folder, and the GGUF file in it if the weights are one."""

    folder: Path
    gguf: Path | None = None


def locate_source(source: str | Path, gguf_file: str | None = None, revision: str | None = None) -> Source:
    """Finds a checkpoint, downloading it where it is a Hub id (`HF_ENDPOINT` and `HF_HUB_OFFLINE` apply).

    Args:
        source: a folder, a `.gguf` file, or a Hub id such as `org/name`.
        gguf_file: name of a GGUF file in that folder or repository.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        ValueError: nothing there, or several GGUF files and none named.
        ConnectionError: the Hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"source={source}: is a file, but no .gguf; give the folder of the checkpoint.")
        return Source(path.parent, path)
    if path.is_dir():
        return _locate_in_folder(path, gguf_file)
    if not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"source={source}: is neither a folder, a .gguf file nor a Hub id; check the path.")
    return _download(str(source), gguf_file, revision)


def _locate_in_folder(folder: Path, gguf_file: str | None) -> Source:
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise ValueError(f"gguf_file={gguf_file}: not in {folder}; the GGUF files there are {_ggufs(folder)}.")
        return Source(folder, folder / gguf_file)
    if (folder / "config.json").is_file():
        return Source(folder)
    found = _ggufs(folder)
    if len(found) > 1:
        raise ValueError(f"source={folder}: has several GGUF files, {found}; choose one by gguf_file.")
    if not found:
        raise ValueError(f"source={folder}: has no config.json and no GGUF file; give the folder of a checkpoint.")
    return Source(folder, folder / found[0])


def _ggufs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.gguf"))


def _download(repository: str, gguf_file: str | None, revision: str | None) -> Source:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.safetensors", "model.safetensors.index.json", "config.json", *COMPANIONS]
    try:
        if gguf_file is not None:
            file = Path(hf_hub_download(repository, gguf_file, revision=revision))
            return Source(file.parent, file)
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=list(HUB_IGNORED)
        )
        return Source(Path(folder))
    except LocalEntryNotFoundError as error:
        raise _not_cached(repository, error) from None
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise _not_served(repository, isinstance(error, GatedRepoError)) from None
    except (RevisionNotFoundError, EntryNotFoundError):
        missing = f"gguf_file={gguf_file}" if gguf_file else f"revision={revision}"
        raise ValueError(f"source={repository}: {missing} is not in this repository; look at its files.") from None
    except HfHubHTTPError as error:
        raise ConnectionError(f"source={repository}: the Hub does not answer ({one_line(error)})") from None


def _not_served(repository: str, gated: bool) -> ValueError:
    reason = "asks to accept its terms" if gated else "is not on the Hub, or is private"
    return ValueError(
        f"source={repository}: is no folder here, and the repository {reason}; check the name, or log in with "
        "`hf auth login`."
    )


def _not_cached(repository: str, error: Exception) -> Exception:
    """Why a repository that is not in the cache could not be had: by choice, by name, or for the network."""
    if is_offline_mode():
        return ValueError(
            f"source={repository}: is no folder here and not in the Hub cache, and HF_HUB_OFFLINE is set; unset it, or "
            "give a folder."
        )
    status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return _not_served(repository, gated=False)
    return ConnectionError(f"source={repository}: is no folder here, and the Hub cannot be reached")


def read_config_fields(path: Path) -> dict[str, Any]:
    """The fields of a config.json. Raises `ValueError` where it is missing or is no table."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; give the folder of a checkpoint, with its config.json.")
    try:
        fields = json.loads(path.read_bytes())
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: is not valid JSON; fetch this file again.")
    return fields


def companions(folder: Path, patterns: tuple[str, ...] = COMPANIONS) -> list[Path]:
    """Files of a checkpoint, besides its configuration and weights, that its converted form needs too."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found if path.suffix not in (".safetensors", ".gguf", ".py"))


def copy_companions(source: Path, target: Path, patterns: tuple[str, ...] = COMPANIONS) -> list[str]:
    """Copies them, byte for byte, and returns their names."""
    names = companions(source, patterns)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return [str(name) for name in names]


def check_companions(folder: Path) -> None:
    """Raises `ValueError` for one that should be a JSON object and is cut short, or a pointer to what is elsewhere."""
    for path in (folder / name for name in companions(folder) if name.suffix == ".json"):
        try:
            is_table = isinstance(json.loads(path.read_bytes()), dict)
        except ValueError:  # of JSON and of UTF-8 alike
            is_table = False
        if not is_table:
            raise ValueError(f"{path}: is no JSON object; fetch this file again.")


def legacy_generation(fields: dict[str, Any]) -> dict[str, Any]:
    """The generation defaults that older folders keep in config.json, where the library still looks for them."""
    names = set(vars(GenerationConfig())) - {*SHARED, "transformers_version"}
    return {name: value for name, value in fields.items() if name in names and value is not None}


def keep_generation_defaults(fields: dict[str, Any], folder: Path) -> None:
    """Moves such defaults into generation_config.json, for a rewritten config.json has no room for them."""
    path = folder / "generation_config.json"
    if not path.exists() and (defaults := legacy_generation(fields)):
        tokens = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in fields}
        # Written without the checks of `save_pretrained`, which reject combinations that loading accepts.
        GenerationConfig(**tokens, **defaults).to_json_file(path)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)
