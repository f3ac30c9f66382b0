"""Documents of a text source, and their split into calibration and evaluation.

Reading order: which kind of source -> its reader -> the split.
"""

import csv
import gzip
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from .fetch import BUILT_IN_TEXTS, fetch_package_files

logger = logging.getLogger(__name__)

DOCUMENT_BREAK = re.compile(r"\f|\n[ \t]*\n[ \t]*\n\s*")  # form feed, or two blank lines and more
APPARATUS = re.compile(r"\{[^{}]*\}|&gt;")


def load_documents(source: str | Path) -> list[str]:
    """The documents of a text source, without empty ones, in the source's order.

    Args:
        source: one of
            - a built-in name: `bbc` (2,127 news articles, the publisher's text, fetched and not redistributed) or
              `bible` (World English Bible, public domain, one document a chapter);
            - a `.txt` file, its documents separated by a form feed or by two blank lines and more, else one document;
            - a `.jsonl` file, one object with a string `text` a line;
            - a folder of `.txt` files, one document each;
            - a folder or Hub name of `datasets`, as `NAME[:CONFIG[:SPLIT[:COLUMN]]]`; by default the split `train`
              (else the first) and the column `text` (else the only one of strings).

    Raises:
        ValueError: an unknown source, one that cannot be read as text, or one without any text.
    """
    documents = [document.strip() for document in _read(str(source))]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"text={str(source)!r}: has no text; name a source that has some.")
    return documents


def _read(source: str) -> list[str]:
    path = Path(source).expanduser()
    if source in BUILT_IN_TEXTS:
        return BUILT_IN_READERS[source]()
    if path.is_file():
        return _read_file(path)
    if path.is_dir() and (files := sorted(path.glob("*.txt"))):
        return [_read_text(file) for file in files]
    name = source.split(":")[0]
    if path.is_dir() or "/" in name or ":" in source:
        return _read_dataset(source)
    raise ValueError(
        f"text={source!r}: is no file or folder and not built in; use one of {sorted(BUILT_IN_TEXTS)}, a .txt or "
        ".jsonl file, a folder of .txt files, or a dataset as NAME:CONFIG:SPLIT."
    )


def _read_bbc() -> list[str]:
    package = BUILT_IN_TEXTS["bbc"]
    files = fetch_package_files(package.name, package.version, package.members)
    articles = (_decode(file.read_bytes()).strip() for file in files)
    return list(dict.fromkeys(articles))  # 98 articles are filed twice


def _decode(content: bytes) -> str:
    """UTF-8, and for the one article that is not, the encoding its pound signs are in."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252")


def _read_bible() -> list[str]:
    """Chapters: verses joined by a space; footnotes (in braces) and the marks that begin a psalm left out."""
    package = BUILT_IN_TEXTS["bible"]
    (file,) = fetch_package_files(package.name, package.version, package.members)
    chapters: dict[tuple[str, str], list[str]] = {}
    with gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines)
        next(rows)  # the header
        for _, book, chapter, _, verse in rows:
            chapters.setdefault((book, chapter), []).append(APPARATUS.sub(" ", verse))
    return [" ".join(" ".join(verses).split()) for verses in chapters.values()]


BUILT_IN_READERS = {"bbc": _read_bbc, "bible": _read_bible}


def _read_file(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [_text_of(line, path, number) for number, line in enumerate(_read_text(path).splitlines(), 1) if line]
    if path.suffix == ".txt":
        return DOCUMENT_BREAK.split(_read_text(path))
    raise ValueError(f"text={str(path)!r}: a text file ends in .txt or .jsonl; rename or convert it.")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text={str(path)!r}: byte {error.start} is not UTF-8; convert the file to UTF-8.") from None


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"text={str(path)!r}: line {number} is no JSON object with a string 'text'; correct it.")
    return text


def _read_dataset(source: str) -> list[str]:
    from datasets import DatasetDict

    name, config, split, column = ([part or None for part in source.split(":")] + [None] * 4)[:4]
    try:
        dataset = _load_dataset(str(name), config, split)
    except Exception as error:  # of a library that raises of every kind: what matters is that it did not load
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"text={source!r}: `datasets` cannot load it ({reason}); check NAME:CONFIG:SPLIT:COLUMN, or use one of "
            f"{sorted(BUILT_IN_TEXTS)}."
        ) from error
    if isinstance(dataset, DatasetDict):
        dataset = dataset["train"] if "train" in dataset else next(iter(dataset.values()))
    return [text or "" for text in dataset[_text_column(source, dataset, column)]]


def _load_dataset(name: str, config: str | None, split: str | None) -> Any:
    from datasets import load_dataset, load_from_disk

    folder = Path(name).expanduser()
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        dataset = load_from_disk(str(folder))
        return dataset[split] if split else dataset
    return load_dataset(str(folder) if folder.is_dir() else name, config, split=split)


def _text_column(source: str, dataset: Any, column: str | None) -> str:
    strings = [name for name, kind in dataset.features.items() if getattr(kind, "dtype", None) in STRING_DTYPES]
    if column is None and "text" in strings:
        return "text"
    if column is None and len(strings) == 1:
        return strings[0]
    if column is None or column not in strings:
        raise ValueError(
            f"text={source!r}: column {column!r} is not one of its columns of text {strings}; name one as "
            "NAME:CONFIG:SPLIT:COLUMN."
        )
    return column


STRING_DTYPES = ("string", "large_string")


def split_documents(
    documents: list[str], evaluation_share: float = 0.1, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Calibration and evaluation documents: whole ones, each on a side that its own content decides.

    A document's side and place depend on the hash of its words and the seed alone: it stays where it is when others
    join or leave the source, and copies that differ in white space stay together. Both sides are in the order of these
    hashes, so the first tokens of a side are a fair sample of it.

    A source of one document is cut in two halves at a white space, the second one for evaluation.

    Args:
        documents: of `load_documents`.
        evaluation_share: share of documents for evaluation, in (0, 1]; 1 takes all and leaves no calibration.
        seed: of another split.

    Raises:
        ValueError: a share outside (0, 1], or no document.
    """
    if not 0 < evaluation_share <= 1:
        raise ValueError(f"evaluation_share={evaluation_share}: must be above 0 and at most 1; 0.1 is the default.")
    if not documents:
        raise ValueError("documents=[]: there is nothing to split; load a source that has text.")
    if len(documents) == 1 and evaluation_share < 1:
        return _halves(documents[0])
    places = {document: _place(document, seed) for document in documents}
    ordered = sorted(documents, key=lambda document: places[document])
    # With few documents the hash may leave a side empty: each gets at least one.
    count = sum(places[document] < evaluation_share for document in ordered)
    count = len(ordered) if evaluation_share == 1 else min(max(count, 1), len(ordered) - 1)
    return ordered[count:], ordered[:count]


def _place(document: str, seed: int) -> float:
    """A number in [0, 1) that follows from the document's words and the seed."""
    words = " ".join(document.split())
    digest = hashlib.sha256(f"{seed}\n{words}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _halves(document: str) -> tuple[list[str], list[str]]:
    space = re.compile(r"\s").search(document, len(document) // 2)
    if space is None:
        raise ValueError("documents: the only document has no white space to cut it at; give a longer text.")
    logger.warning("the source is one document: its first half is for calibration, its second for evaluation")
    return [document[: space.start()]], [document[space.end() :]]
