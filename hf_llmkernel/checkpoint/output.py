"""Output folders that appear whole or not at all: written beside their name, and renamed when done."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # a platform without advisory locks: two writers into one folder are not told apart
    fcntl = None


MARKER = ".hf_llmkernel_part"
MARKER_TEXT = "An output folder of hf_llmkernel that is not finished; it can be removed when nothing writes into it.\n"


def check_output(path: str | Path) -> None:
    """Raises `ValueError` where something is in the way of an output folder; call it before long work."""
    path = Path(path).expanduser()
    above = next((parent for parent in path.parents if parent.exists()), path)
    if above.exists() and not above.is_dir():
        raise ValueError(f"output={path}: {above} is a file, not a folder; choose another place.")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"output={path}: exists and is not a folder; choose another name or remove it.")
    if (path / MARKER).is_file():
        raise ValueError(
            f"output={path}: is complete, the run that wrote it was killed as it ended; remove {MARKER} in it and use "
            "it, or choose another folder."
        )
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"output={path}: exists and is not empty; choose another folder or remove it.")
    part = part_folder(path)
    if part.is_symlink() or (part.exists() and not _is_own(part)):
        raise ValueError(f"output={path}: {part} is in the way and was not made by this program; remove or rename it.")


def _is_own(part: Path) -> bool:
    """Whether an unfinished folder is this program's: it has the mark, or nothing, if it ended before it made that."""
    return part.is_dir() and ((part / MARKER).is_file() or not any(part.iterdir()))


def part_folder(path: str | Path) -> Path:
    """The sibling folder in which an output is written: `<path>.part`."""
    path = Path(path).expanduser()
    return path.with_name(f"{path.name}.part")


@contextmanager
def output_folder(path: str | Path, resume: bool = False, scratch: str | None = None) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends without an error, and else disappears.

    A run that was killed leaves `<path>.part`, which the next one clears, if it is this program's own.

    Args:
        path: the final name; missing, or an empty folder.
        resume: keep an earlier run's `<path>.part` at the start, and this one's on an error.
        scratch: name of a folder inside that is of use to an unfinished run alone; it goes once `path` is there.

    Raises:
        ValueError: something is in the way, or another process writes there now.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))
    check_output(path)
    part = part_folder(path)
    part.mkdir(parents=True, exist_ok=True)
    with (part / MARKER).open("a", encoding="utf-8") as marker:
        _lock(marker, path)
        try:
            if marker.tell() == 0:
                marker.write(MARKER_TEXT)
                marker.flush()
            if not resume:
                _clear(part)
            yield part
            _publish(part, path, scratch)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
                error.filename = str(part)  # a write that fails does not say where
            if not resume:
                shutil.rmtree(part, ignore_errors=True)
            raise


def _lock(marker: IO, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"output={path}: another process is writing there; wait for it or choose another.") from None


def _clear(part: Path) -> None:
    for entry in part.iterdir():
        if entry.name == MARKER:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _publish(part: Path, path: Path, scratch: str | None) -> None:
    check_output(path)
    for entry in (*part.rglob("*"), part):
        if scratch is None or part / scratch not in (entry, *entry.parents):
            _sync(entry)
    if path.is_dir():
        path.rmdir()
    os.rename(part, path)
    _sync(path.parent)
    _settle(path, scratch)


def _settle(path: Path, scratch: str | None) -> None:
    """Removes what the run alone needed, the mark last."""
    if scratch is not None and (path / scratch).is_dir():
        shutil.rmtree(path / scratch)
    (path / MARKER).unlink()


def note_outcome(part: Path, outcome: str) -> None:
    """Keeps, in an output that is about to appear, what its run has to say: it may be killed before it says it."""
    (part / MARKER).write_text(MARKER_TEXT + outcome, encoding="utf-8")  # which keeps the lock


def take_outcome(path: str | Path, scratch: str | None = None) -> str | None:
    """What the run that wrote `path` noted, where it was killed between its appearance and its end; ends it now.

    Raises:
        ValueError: that run has not been killed, but is ending.
    """
    path = Path(path).expanduser()
    if not (path / MARKER).is_file():
        return None
    with (path / MARKER).open(encoding="utf-8") as marker:
        _lock(marker, path)
        outcome = marker.read().removeprefix(MARKER_TEXT)
        _settle(path, scratch)
    return outcome


def _sync(entry: Path) -> None:
    """Makes a file, or the names in a folder, reach the disk."""
    if entry.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # a platform that opens no folders
    handle = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_disk_space(path: str | Path, needed_bytes: int) -> None:
    """Raises `OSError` (ENOSPC) where the disk of `path`, which may not exist yet, has fewer bytes free than needed."""
    existing = Path(os.path.abspath(Path(path).expanduser()))
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"not enough disk space: {needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            str(path),
        )
