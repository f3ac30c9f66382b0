#!/usr/bin/env bash
# Everything that has to hold: lint, the rules of transformers for model files, types, tests. Options go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment test
cd "$ROOT"

echo "== ruff"
"$PYTHON" -m ruff check .
echo "== mlinter"
"$PYTHON" -m mlinter --no-progress --no-cache hf_llmkernel/model/modeling_llm_kernel.py hf_llmkernel/model/configuration_llm_kernel.py
echo "== pyright"
# It brings its own node; without the variable it would ask a registry for a newer version of itself.
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$PYTHON" -m pyright --pythonpath "$PYTHON"
echo "== pytest"
# One thread a worker: the workers are the parallelism.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" -m pytest --numprocesses auto --dist loadgroup "$@"
