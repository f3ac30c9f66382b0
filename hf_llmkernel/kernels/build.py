"""Compiles the native library beside this file: `python -m hf_llmkernel.kernels.build`, and a hook of the build.

A build without a working compiler is still a build: the package then runs on torch. The library is plain C++17 behind a
C ABI, independent of the Python and torch versions, and one file serves every x86-64 processor: the code of each
instruction set is a file of its own and is chosen when the library is first used.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Hook: Any = object
try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    Hook = BuildHookInterface
except ImportError:  # not in a build
    pass

FOLDER = Path(__file__).resolve().parent
SOURCES = FOLDER / "native"
LIBRARY = FOLDER / "libllmkernel.so"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-pthread",
    "-w",
)  # GCC warns of its own intrinsics
LEVEL_FLAGS = {
    "level_avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512vbmi2", "-mavx512bf16"),
        *("-mfma", "-mf16c", "-mpopcnt", "-mprefer-vector-width=512"),
    ),
    "level_avx2": ("-mavx2", "-mfma", "-mf16c", "-mpopcnt"),
}


class BuildError(Exception):
    """There is no compiler, or it failed; the message says which and what it printed."""


def sources_hash() -> str:
    """What the library is made of, as a hash that the library carries."""
    state = hashlib.sha256(f"{platform.machine()} {FLAGS} {LEVEL_FLAGS}".encode())
    for path in sorted(SOURCES.iterdir()):
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()


def is_current() -> bool:
    """Whether the library is there and made of the present sources."""
    return LIBRARY.is_file() and sources_hash().encode() in LIBRARY.read_bytes()


def build() -> None:
    """Compiles and links the library, unless it is current.

    Raises:
        BuildError: no compiler, or an error of it.
    """
    if is_current():
        return
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        units = [path for path in sorted(SOURCES.glob("*.cpp")) if is_for_this_machine(path)]
        objects = list(pool.map(lambda unit: compile_unit(compiler, unit, Path(folder)), units))
        linked = Path(folder) / LIBRARY.name
        run([*compiler, "-shared", "-pthread", *own_flags(), "-o", str(linked), *map(str, objects)])
        # Beside the old one, then in its place: a running process keeps what it has mapped.
        fresh = LIBRARY.with_suffix(f".{os.getpid()}")
        shutil.copyfile(linked, fresh)
        fresh.replace(LIBRARY)


def find_compiler() -> list[str]:
    """`$CXX`, else the first C++ compiler there is. Raises `BuildError` where there is none."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler: install g++ or clang++, or name one in CXX")


def own_flags() -> list[str]:
    """`$CXXFLAGS`, behind all others."""
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def is_for_this_machine(unit: Path) -> bool:
    return unit.stem not in LEVEL_FLAGS or platform.machine() in ("x86_64", "AMD64")


def compile_unit(compiler: list[str], unit: Path, folder: Path) -> Path:
    target = folder / f"{unit.stem}.o"
    identity = (f'-DLLMK_SOURCES="{sources_hash()}"',) if unit.stem == "isa" else ()
    flags = (*FLAGS, *LEVEL_FLAGS.get(unit.stem, ()), *identity, *own_flags())
    run([*compiler, *flags, "-c", str(unit), "-o", str(target)])
    return target


def run(command: list[str]) -> None:
    try:
        ended = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from None
    if ended.returncode:
        raise BuildError(f"{' '.join(command)}\n{ended.stderr[-4000:]}")


class NativeLibraryHook(Hook):
    """Puts the library into the wheel, or beside the sources of an editable install, where it can be compiled."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        try:
            build()
        except BuildError as error:
            print(f"hf_llmkernel: built without native kernels, torch serves instead: {error}", file=sys.stderr)
            return
        build_data["artifacts"].append(f"/{LIBRARY.relative_to(self.root)}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(f"error: {error}")
    print(LIBRARY)
