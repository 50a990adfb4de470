#!/bin/bash
# torchrun.sh [FLAGS] - train.py under torchrun, on this machine or called on every node.
#
#   launch/torchrun.sh --optimizer look_layer_sam              # all GPUs here, or one rank
#   RANKS=4 launch/torchrun.sh ...                             # ranks on this node
#   NODES=8 MASTER_ADDR=node1 launch/torchrun.sh ...           # the same line on each of 8 nodes
#   srun --nodes 8 --ntasks-per-node 1 launch/torchrun.sh ...  # or let SLURM do that
#
# Variables: SITE, PYTHON, CONTAINER as in cluster/README.md; MASTER_PORT (29500, under SLURM from the
# job's id); MASTER_WAIT, seconds to wait for the first node to start (600).
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$project/launch/checks.sh"
as_group "$@"
in_container
[[ -z ${SITE:-} ]] || . "$SITE"
[[ ${NODES:-}${SLURM_STEP_NUM_NODES:-} || ${MASTER_ADDR:-localhost} =~ ^(localhost|127\..*)$ ]] ||
    stop "MASTER_ADDR=$MASTER_ADDR needs NODES, the number of nodes on which this is called"
NODES=${NODES:-${SLURM_STEP_NUM_NODES:-1}} job=${SLURM_JOB_ID:-0}
counted NODES "$NODES"
[[ ! ${RANKS:-} ]] || counted RANKS "$RANKS"
((NODES == ${SLURM_STEP_NUM_NODES:-$NODES})) ||
    stop "NODES must be the $SLURM_STEP_NUM_NODES nodes of this SLURM step, got $NODES; leave it out"
where=(--standalone)
if ((NODES > 1)); then
    MASTER_PORT=${MASTER_PORT:-$((29500 + job % 1000))}
    if [[ ${SLURM_STEP_NODELIST:-} ]]; then
        MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -1)}
    else
        meeting_point "${MASTER_ADDR:-}" "$MASTER_PORT"
    fi
    where=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-id "looksam-$job"
        --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT")
fi
ranks=${RANKS:-1}
[[ ${RANKS:-} || (! -e /dev/nvidia0 && ! -e /dev/kfd) ]] || ranks=auto # a rank for each GPU
exec "${RUN[@]}" "${PYTHON:-$project/.venv/bin/python}" -m torch.distributed.run "${where[@]}" \
    --nproc-per-node "$ranks" "$project/train.py" "${FLAGS[@]}"
