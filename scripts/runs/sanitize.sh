#!/usr/bin/env bash
# The native kernels under ThreadSanitizer, their tests too, with four threads; then under AddressSanitizer and
# UndefinedBehaviorSanitizer: their tests, and fuzzed shapes.
#
#   bash scripts/runs/sanitize.sh [SECONDS]
#
# SECONDS of fuzzing, 60 by default. All is built and run in a copy; it ends with the first fault. Needs g++.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
make_environment test
copy="$(mktemp -d)"
trap 'rm -rf "$copy"' EXIT
cp -r "$ROOT"/{hf_llmkernel,tests,scripts,pyproject.toml} "$copy"
cd "$copy"
export PYTHONPATH="$copy"
g++ -std=c++17 -O1 -g -fsanitize=thread -I hf_llmkernel/kernels/native scripts/runs/pool_stress.cpp \
    hf_llmkernel/kernels/native/pool.cpp -pthread -o pool_stress
./pool_stress

# under LIBRARIES COMMAND…: runs a command with the libraries of sanitizers loaded first.
under() {
    local name paths=""
    for name in $1 stdc++; do paths+="$(g++ -print-file-name="lib$name.so") "; done
    LD_PRELOAD="$paths" "${@:2}"
}

# test_under LIBRARIES FLAGS: builds the kernels with these flags and runs their tests.
test_under() {
    rm -f hf_llmkernel/kernels/libllmkernel.so  # of other flags it would be up to date
    CXX=g++ CXXFLAGS="-O1 -g $2" "$PYTHON" -m hf_llmkernel.kernels.build
    # The tests left out compile or train; nothing of them is native.
    under "$1" "$PYTHON" -m pytest tests/kernels -q -s -p no:cacheprovider \
        -k "not test_build and not compiled and not measurement"
}

export TSAN_OPTIONS="halt_on_error=1 report_signal_unsafe=0 history_size=4"
LLMKERNEL_THREADS=4 OMP_NUM_THREADS=1 test_under tsan -fsanitize=thread
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
# Vectors are loaded from wherever they are, which the check of alignment takes for a fault.
test_under "asan ubsan" "-fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=undefined"
under "asan ubsan" "$PYTHON" scripts/runs/fuzz_kernels.py --seconds "${1:-60}"
