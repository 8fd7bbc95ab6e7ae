#!/usr/bin/env bash
# From a fresh clone to a trained toy model and its report, on two CPU cores: bash examples/quickstart.sh
# Extra arguments go to the training run: bash examples/quickstart.sh --with_baseline true
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source examples/setup_env.sh
setup_environment

output=outputs/quickstart
previous=""
for argument in "$@"; do
    if [ "$previous" = --output_dir ]; then output=$argument; fi
    case $argument in --output_dir=*) output=${argument#*=} ;; esac
    previous=$argument
done

# Large pages for large tensors, where the kernel has them: some per cent of a step on a CPU.
export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}"

echo "[quickstart] training the toy preset: three stages, results in $output"
torchrun --nproc-per-node 1 examples/pretrain_cocoa.sh \
    --evaluate true --output_dir "$output" --overwrite true "$@"
echo "[quickstart] done. Open $output/report.html in a browser."
