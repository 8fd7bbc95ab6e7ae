#!/usr/bin/env bash
# Set up what is missing, then run the default tests: bash tests/run.sh [pytest arguments]
# Slow tests: bash tests/run.sh -m slow. Tests that need a GPU: bash tests/run.sh -m gpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source examples/setup_env.sh
setup_environment

# Distributed tests start up to four processes: with one thread each they do not fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
exec python -m pytest "$@"
