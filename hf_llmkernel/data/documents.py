"""Documents of a text source, and their split into calibration and evaluation.

Reading order: which kind of source -> its reader -> the split.
"""

import csv
import gzip
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .conversations import CHAT_COLUMNS, Conversation, is_conversation, read_conversation
from .fetch import BUILT_IN_TEXTS, fetch_package_files

logger = logging.getLogger(__name__)

Document = str | Conversation
DOCUMENT_BREAK = re.compile(r"\f|\n[ \t]*\n[ \t]*\n\s*")  # form feed, or two blank lines and more
SOURCE_COLON = re.compile(r":(?![^\[]*\])")  # not that of a slice, as in NAME::train[:1000]
APPARATUS = re.compile(r"\{[^{}]*\}|&gt;")


def load_documents(source: str | Path) -> list[Document]:
    """The documents of a text source, without empty ones, in the source's order.

    Args:
        source: one of
            - a built-in name: `bbc` (2,127 news articles, the publisher's text, fetched and not redistributed) or
              `bible` (World English Bible, public domain, one document a chapter);
            - a `.txt` file, its documents separated by a form feed or by two blank lines and more, else one document;
            - a `.jsonl` file, one object a line, with a string `text` or a conversation as `messages` or
              `conversations`: a list of `{role, content}`, or of ShareGPT's `{from, value}`;
            - a folder of `.txt` files, one document each;
            - a `.parquet` or `.csv` file, with `:COLUMN` behind it where the rule below does not find the column;
            - a folder or Hub name of `datasets`, as `NAME[:CONFIG[:SPLIT[:COLUMN]]]`, the split as `datasets` knows
              it (`train[:1000]`); by default the split `train` (else the first) and the column `text`, else `messages`
              or `conversations`, else the only one of strings. A column that is named may be of conversations too.

    Conversations stay what they are until a tokenizer reads them: the template is the model's.

    Raises:
        ValueError: an unknown source, one that cannot be read as text, or one without any text.
    """
    documents = [document.strip() if isinstance(document, str) else document for document in _read(str(source))]
    documents = [document for document in documents if _words(document)]
    if not documents:
        raise ValueError(f"text={str(source)!r}: has no text; name a source that has some.")
    return documents


def _read(source: str) -> Sequence[Document]:
    path = Path(source).expanduser()
    if source in BUILT_IN_TEXTS:
        return BUILT_IN_READERS[source]()
    if path.is_file():
        return _read_table(path, None) if path.suffix in TABLES else _read_file(path)
    file, _, column = source.rpartition(":")
    if Path(file).suffix in TABLES and Path(file).expanduser().is_file():
        return _read_table(Path(file).expanduser(), column)
    if path.is_dir() and (files := sorted(path.glob("*.txt"))):
        return [_read_text(file) for file in files]
    name = source.split(":")[0]
    if path.is_dir() or "/" in name or ":" in source:
        return _read_dataset(source)
    raise ValueError(
        f"text={source!r}: is no file or folder and not built in; use one of {sorted(BUILT_IN_TEXTS)}, a .txt, "
        ".jsonl, .parquet or .csv file, a folder of .txt files, or a dataset as NAME:CONFIG:SPLIT."
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


def _read_file(path: Path) -> Sequence[Document]:
    if path.suffix == ".jsonl":
        lines = enumerate(_read_text(path).split("\n"), 1)  # not splitlines: strings of JSON may hold U+2028
        return [_document_of(line, f"text={str(path)!r}: line {number}") for number, line in lines if line.strip()]
    if path.suffix == ".txt":
        return DOCUMENT_BREAK.split(_read_text(path))
    raise ValueError(f"text={str(path)!r}: a text file ends in .txt, .jsonl, .parquet or .csv; rename or convert it.")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text={str(path)!r}: byte {error.start} is not UTF-8; convert the file to UTF-8.") from None


def _document_of(line: str, where: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        for name in CHAT_COLUMNS:
            if name in row:
                return read_conversation(row[name], where)
    raise ValueError(f"{where} is no JSON object with a string 'text' or a list 'messages'; correct it.")


def _read_dataset(source: str) -> Sequence[Document]:
    from datasets import DatasetDict

    name, config, split, column = ([part or None for part in SOURCE_COLON.split(source)] + [None] * 4)[:4]
    try:
        dataset = _load_dataset(str(name), config, split)
    except Exception as error:  # of a library that raises of every kind: what matters is that it did not load
        raise ValueError(
            f"text={source!r}: `datasets` cannot load it ({_reason(error)}); check NAME:CONFIG:SPLIT:COLUMN, or use "
            f"one of {sorted(BUILT_IN_TEXTS)}."
        ) from error
    if isinstance(dataset, DatasetDict):
        dataset = dataset["train"] if "train" in dataset else next(iter(dataset.values()))
    return _documents_of(source, dataset, _column(source, dataset, column, "NAME:CONFIG:SPLIT:COLUMN"))


def _reason(error: Exception) -> str:
    """The first line of what a library says."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _read_table(path: Path, column: str | None) -> Sequence[Document]:
    from datasets import Dataset

    source = str(path)
    try:
        dataset = Dataset(TABLES[path.suffix](path))
    except Exception as error:  # likewise
        kind = path.suffix[1:]
        raise ValueError(f"text={source!r}: is no {kind} file that can be read ({_reason(error)}).") from error
    return _documents_of(source, dataset, _column(source, dataset, column, "FILE:COLUMN"))


def _parquet_table(path: Path) -> Any:
    from pyarrow import parquet

    return parquet.read_table(path)


def _csv_table(path: Path) -> Any:
    from pyarrow import csv as tables

    return tables.read_csv(path, parse_options=tables.ParseOptions(newlines_in_values=True))


TABLES = {".parquet": _parquet_table, ".csv": _csv_table}


def _documents_of(source: str, dataset: Any, column: str) -> Sequence[Document]:
    if is_conversation(dataset.features[column]):
        rows = enumerate(dataset[column])
        return [read_conversation(messages, f"text={source!r}: row {number}") for number, messages in rows]
    return [text or "" for text in dataset[column]]


def _load_dataset(name: str, config: str | None, split: str | None) -> Any:
    from datasets import load_dataset, load_from_disk

    folder = Path(name).expanduser()
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        dataset = load_from_disk(str(folder))
        return dataset[split] if split else dataset
    return load_dataset(str(folder) if folder.is_dir() else name, config, split=split)


def _column(source: str, dataset: Any, column: str | None, naming: str) -> str:
    features = dataset.features
    strings = [name for name, kind in features.items() if getattr(kind, "dtype", None) in STRING_DTYPES]
    known = strings + [name for name, kind in features.items() if is_conversation(kind)]
    usual = [name for name in ("text", *CHAT_COLUMNS) if name in known]
    if column is None and (usual or len(strings) == 1):
        return (usual or strings)[0]
    if column is None or column not in known:
        raise ValueError(
            f"text={source!r}: column {column!r} is not one of its columns of text {known}; name one as {naming}."
        )
    return column


STRING_DTYPES = ("string", "large_string")


def split_documents(
    documents: Sequence[Document], evaluation_share: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Calibration and evaluation documents: whole ones, each on a side that its own content decides.

    A document's side and place depend on the hash of its words and the seed alone: it stays where it is when others
    join or leave the source, and copies that differ in white space stay together. Of a conversation that is what was
    said, whatever template will be applied. Both sides are in the order of these
    hashes, so the first tokens of a side are a fair sample of it.

    A source of one text is cut in two halves at a white space, the second one for evaluation.

    Args:
        documents: of `load_documents`.
        evaluation_share: share of documents for evaluation, in (0, 1]; 1 takes all and leaves no calibration.
        seed: of another split.

    Raises:
        ValueError: a share outside (0, 1], no document, or a conversation alone, which is not cut.
    """
    if not 0 < evaluation_share <= 1:
        raise ValueError(f"evaluation_share={evaluation_share}: must be above 0 and at most 1; 0.1 is the default.")
    if not documents:
        raise ValueError("documents=[]: there is nothing to split; load a source that has text.")
    if len(documents) == 1 and evaluation_share < 1:
        return _halves(documents[0])
    placed = sorted(((_place(document, seed), document) for document in documents), key=lambda pair: pair[0])
    # With few documents the hash may leave a side empty: each gets at least one.
    count = sum(place < evaluation_share for place, _ in placed)
    count = len(placed) if evaluation_share == 1 else min(max(count, 1), len(placed) - 1)
    ordered = [document for _, document in placed]
    return ordered[count:], ordered[:count]


def _place(document: Document, seed: int) -> float:
    """A number in [0, 1) that follows from the document's words and the seed."""
    digest = hashlib.sha256(f"{seed}\n{_words(document)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _words(document: Document) -> str:
    return " ".join((document if isinstance(document, str) else document.text).split())


def _halves(document: Document) -> tuple[list[Document], list[Document]]:
    if not isinstance(document, str):
        raise ValueError("documents: the only one is a conversation, which is not cut in two; give at least two.")
    space = re.compile(r"\s").search(document, len(document) // 2)
    if space is None:
        raise ValueError("documents: the only document has no white space to cut it at; give a longer text.")
    logger.warning("the source is one document: its first half is for calibration, its second for evaluation")
    return [document[: space.start()]], [document[space.end() :]]
