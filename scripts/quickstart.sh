#!/usr/bin/env bash
# The main job on a fresh machine: makes an environment, installs, and runs `llmkernel quickstart` with these options.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
exec "$PYTHON" -m hf_llmkernel quickstart "$@"
