#!/usr/bin/env bash
''''true
# Train the three CoCoA stages. Without arguments this is the toy preset; --help lists all settings.
#
#   torchrun --nproc-per-node 4 examples/pretrain_cocoa.sh --parallel.tensor_model_parallel_size 2
#   NPROC_PER_NODE=4 bash examples/pretrain_cocoa.sh --parallel.tensor_model_parallel_size 2
#
# The second form also takes NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT. A run of 16 ranks on two nodes: start this
# on both, with NODE_RANK=0 on the node that MASTER_ADDR names and NODE_RANK=1 on the other:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 NPROC_PER_NODE=8 bash examples/pretrain_cocoa.sh --preset qwen2.5-vl-7b ...
#
# One file, two languages, because torchrun runs its script with Python and people run theirs with a shell. To a shell
# the four quotes above are two empty strings before `true`; it runs the lines down to `exec` and takes the rest for a
# here-document. To Python they open a string that ends with the quotes after the here-document's name.
here=$(cd "$(dirname "$0")" && pwd)
command -v torchrun >/dev/null || PATH="$here/../.venv/bin:$PATH"
command -v torchrun >/dev/null || {
    echo "torchrun was not found: activate an environment with torch, or run examples/quickstart.sh once" >&2
    exit 1
}
if [ "${NNODES:-1}" = 1 ]; then
    nodes="--standalone"
else
    nodes="--nnodes $NNODES --node-rank ${NODE_RANK:?} --master-addr ${MASTER_ADDR:?}"
    nodes="$nodes --master-port ${MASTER_PORT:-29500}"
fi
# A store that torchrun shares with its ranks keeps their addresses of before a restart, where new ranks find them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
exec torchrun $nodes --nproc-per-node "${NPROC_PER_NODE:-1}" "$here/${0##*/}" "$@"
: <<'# end of the Python half' # '''
import os
import runpy
import sys
from pathlib import Path

# Processes that a checkpoint's writers start import this file again: only the run itself may start training.
if __name__ == "__main__":
    # Communication of tensor and context parallelism overlaps with compute only if a GPU starts kernels in order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Packs differ in length: segments that can grow keep the GPU's allocator from fragmenting. Of torch's two names for
    # its settings the newer one gives way to the other.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root))
    runpy.run_path(str(root / "tools" / "train.py"), run_name="__main__")
# end of the Python half
