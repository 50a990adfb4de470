#!/bin/bash
# torchrun.sh [FLAGS] - train.py under torchrun: on this machine, or one call on every node.
#
#   launch/torchrun.sh --optimizer look_layer_sam              # all GPUs here, or one rank
#   RANKS=4 launch/torchrun.sh ...                             # ranks on this node
#   NODES=8 MASTER_ADDR=node1 launch/torchrun.sh ...           # the same line on each of 8 nodes
#   srun --nodes 8 --ntasks-per-node 1 launch/torchrun.sh ...  # or let SLURM do that
#
# Variables: SITE, PYTHON as in cluster/README.md; MASTER_PORT (29500, under SLURM from the job's id).
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RUN=()
[[ -z ${SITE:-} ]] || . "$SITE"
NODES=${NODES:-${SLURM_STEP_NUM_NODES:-1}} job=${SLURM_JOB_ID:-0}
if ((NODES > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
    [[ ${SLURM_STEP_NODELIST:-} ]] || {
        echo "torchrun.sh: NODES=$NODES needs MASTER_ADDR, the first node's name" >&2
        exit 2
    }
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -1)
fi
where=(--standalone)
((NODES == 1)) || where=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-id "looksam-$job"
    --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-$((29500 + job % 1000))}")
exec "${RUN[@]}" "${PYTHON:-$project/.venv/bin/python}" -m torch.distributed.run "${where[@]}" \
    --nproc-per-node "${RANKS:-auto}" "$project/train.py" "$@"
