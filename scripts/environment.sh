#!/usr/bin/env bash
# Makes the Python environment that the other scripts run in, or reuses it.
#
#   source scripts/environment.sh; make_environment [EXTRAS]
#
# EXTRAS is "" or the name of an extra of pyproject.toml ("test"). Afterwards $PYTHON is the environment's interpreter.
# $LLMKERNEL_VENV is where it stands (default: .venv of this project); $LLMKERNEL_PYTHON is what makes it.
# Messages and pip's progress go to standard error, so that a script's standard output is its own.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "error: $*" >&2
    exit 1
}

# The first Python of at least 3.11. A name may exist and still not run, as the shims of version managers do.
find_python() {
    local candidate
    for candidate in ${LLMKERNEL_PYTHON:+"$LLMKERNEL_PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        elif [ "$candidate" = "${LLMKERNEL_PYTHON:-}" ]; then
            fail "LLMKERNEL_PYTHON=$candidate: is no Python of version 3.11 or newer; name another"
        fi
    done
    fail "found no Python of version 3.11 or newer; install one, or name it in LLMKERNEL_PYTHON"
}

# What the installed state depends on. The project's own path is part of it: an editable install points there.
fingerprint() {
    "$PYTHON" - "$ROOT" "$1" <<'PY'
import hashlib, pathlib, sys
root, extras = pathlib.Path(sys.argv[1]), sys.argv[2]
state = hashlib.sha256(f"{root}\n{extras}\n{sys.version}\n".encode())
native = sorted((root / "hf_llmkernel" / "kernels" / "native").glob("*"))
for path in (root / "pyproject.toml", root / "constraints.txt", *sorted((root / "startup").iterdir()), *native):
    if path.is_file():
        state.update(path.read_bytes())
print(state.hexdigest())
PY
}

# Whether one of these extras is installed as the files now say ("test" holds all that "" needs).
is_installed() {
    local extras stamp
    for extras in "$@"; do
        stamp="$VENV/llmkernel-${extras:-core}.stamp"
        [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint "$extras")" ] && return 0
    done
    return 1
}

make_venv() {
    local base
    base="$(find_python)" || exit 1
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$base has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)"
    if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
        fail "LLMKERNEL_VENV=$VENV: is not empty and no Python environment; name another folder or remove it"
    fi
    echo "Making the environment $VENV with $base" >&2
    "$base" -m venv --clear "$VENV" || fail "$base could not make $VENV; see above, then run this again"
}

# Without compiling: Python does that on import, and for what is imported only, which halves the installation.
pip_install() {
    "$PYTHON" -m pip install --disable-pip-version-check --no-compile ${PIP_QUIET:+"$PIP_QUIET"} \
        --constraint "$ROOT/constraints.txt" "$@" >&2 ||
        fail "pip could not install $*; see above, then run this again"
}

make_environment() {
    local extras="${1:-}"
    VENV="${LLMKERNEL_VENV:-$ROOT/.venv}"
    case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
    PYTHON="$VENV/bin/python"
    "$PYTHON" -c 'import pip' 2>/dev/null || make_venv
    is_installed "$extras" test && return

    echo "Installing hf_llmkernel${extras:+[$extras]} into $VENV" >&2
    [ -t 2 ] || PIP_QUIET=--quiet
    # No stamp while the installation is under way: an interrupted one is done again.
    rm -f "$VENV"/llmkernel-*.stamp
    # Torch first and by its pinned version, so that a local CPU build of it is taken where there is one.
    pip_install "$(grep '^torch==' "$ROOT/constraints.txt")"
    pip_install --editable "$ROOT${extras:+[$extras]}"
    fingerprint "$extras" >"$VENV/llmkernel-${extras:-core}.stamp"
}
