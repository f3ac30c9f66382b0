#!/usr/bin/env bash
# transformers' own CausalLMModelTest, its generation and pipeline tests included, on this family and on stock Llama.
#
#   bash scripts/runs/transformers_suite.sh REPOSITORY [--suite NAME ...] [--workers N] [--keep FOLDER]
#
# REPOSITORY is a checkout of the transformers repository, or its git directory: the source distribution, which CI runs,
# lacks these tests. The counts go to standard output as JSON; transformers_suite.json holds those of the last run. It
# ends with 1 where a test failed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
repository="$(realpath "${1:?is missing: a checkout of transformers, or its git directory}")"
shift
make_environment test
cd "$ROOT"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" -m tests.transformers_common.by_hand "$repository" "$@"
