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
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"output={path}: exists and is not a folder; choose another name or remove it.")
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
def output_folder(path: str | Path, resume: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends without an error, and else disappears.

    A run that was killed leaves `<path>.part`, which the next one clears, if it is this program's own.

    Args:
        path: the final name; missing, or an empty folder.
        resume: keep an earlier run's `<path>.part` at the start, and this one's on an error.

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
            _publish(part, path)
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


def _publish(part: Path, path: Path) -> None:
    check_output(path)
    for entry in (*part.rglob("*"), part):
        _sync(entry)
    if path.is_dir():
        path.rmdir()
    os.rename(part, path)
    (path / MARKER).unlink()
    _sync(path.parent)


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
