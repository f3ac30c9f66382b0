#!/usr/bin/env bash
# The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their tests, then fuzzed shapes. Before that
# their threads under ThreadSanitizer.
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
rm -f "$copy/hf_llmkernel/kernels/libllmkernel.so"
cd "$copy"
export PYTHONPATH="$copy"
g++ -std=c++17 -O1 -g -fsanitize=thread -I hf_llmkernel/kernels/native scripts/runs/pool_stress.cpp \
    hf_llmkernel/kernels/native/pool.cpp -pthread -o pool_stress
./pool_stress
# Vectors are loaded from wherever they are, which the check of alignment takes for a fault.
CXX=g++ CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=undefined" \
    "$PYTHON" -m hf_llmkernel.kernels.build
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
# The tests left out compile or train; nothing of them is native.
"$PYTHON" -m pytest tests/kernels -q -s -p no:cacheprovider -k "not test_build and not traced and not measurement"
"$PYTHON" scripts/runs/fuzz_kernels.py --seconds "${1:-60}"
