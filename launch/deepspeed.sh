#!/bin/bash
# deepspeed.sh [FLAGS] - train.py with ZeRO under DeepSpeed's launcher: pdsh over ssh, one call.
#
#   HOSTFILE=cluster/hostfile launch/deepspeed.sh --optimizer look_layer_sam --zero_stage 2
#   HOSTFILE=cluster/hostfile NODES=4 launch/deepspeed.sh ...     # the first 4 machines
#   launch/deepspeed.sh ...                                       # this machine only
#
# This is `deepspeed --hostfile F --num_nodes N train.py ...` with a free port and the variables that
# pdsh needs. Variables reach other nodes only by a file .deepspeed_env of NAME=VALUE lines, in this
# folder or the home folder: put there what cluster/sites/ would export. PYTHON as in cluster/README.md.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stop() { echo "deepspeed.sh: $*" >&2 && exit 2; }
python=${PYTHON:-$project/.venv/bin/python}
where=()
if [[ ${HOSTFILE:-} ]]; then
    [[ -s $HOSTFILE ]] || stop "HOSTFILE must name a file like cluster/hostfile.example, got '$HOSTFILE'"
    command -v pdsh >/dev/null || stop "pdsh is not here; install it, or use launch/mpi.sh"
    hosts=$(grep -cvE '^ *(#|$)' "$HOSTFILE")
    ((${NODES:-1} <= hosts)) || stop "NODES must be <= the $hosts machines of $HOSTFILE, got $NODES"
    where=(--hostfile "$HOSTFILE" --num_nodes "${NODES:-$hosts}" --force_multi)
elif ((${NODES:-1} > 1)); then
    stop "NODES=$NODES needs HOSTFILE, a file like cluster/hostfile.example"
fi
export PDSH_RCMD_TYPE=ssh PATH="$(dirname "$python"):$PATH"
exec "$python" -m deepspeed.launcher.runner "${where[@]}" \
    --master_port "${MASTER_PORT:-$((20000 + RANDOM % 10000))}" "$project/train.py" "$@"
