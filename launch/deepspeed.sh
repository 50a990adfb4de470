#!/bin/bash
# deepspeed.sh [FLAGS] - train.py with ZeRO under DeepSpeed's launcher: pdsh over ssh, one call.
#
#   HOSTFILE=cluster/hostfile launch/deepspeed.sh --optimizer look_layer_sam --zero_stage 2
#   HOSTFILE=cluster/hostfile NODES=4 launch/deepspeed.sh ...     # the first 4 machines
#   launch/deepspeed.sh ...                                       # this machine only
#
# Runs `deepspeed --hostfile F --num_nodes N train.py ...` with a free port, after a check that all
# machines answer (SSH_CHECK=no skips it). Variables reach other nodes only through a file
# .deepspeed_env of NAME=VALUE lines, in this folder or the home folder: put the exports of a file of
# cluster/sites/ there; SITE and CONTAINER are refused. A line of the hostfile is `node1 slots=8`.
# PYTHON as in cluster/README.md.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$project/launch/checks.sh"
[[ -z ${CONTAINER:-} ]] ||
    stop "CONTAINER is not for DeepSpeed's launcher, got $CONTAINER; unset it, or use launch/torchrun.sh" \
        "here and launch/mpi.sh on several machines"
[[ -z ${SITE:-} || ! ${HOSTFILE:-} ]] ||
    stop "SITE does not reach other machines by DeepSpeed's launcher, got $SITE; unset it, or use launch/mpi.sh"
as_group "$@"
python=${PYTHON:-$project/.venv/bin/python}
where=()
counted NODES "${NODES:-1}"
if [[ ${HOSTFILE:-} ]]; then
    hostfile "$HOSTFILE"
    command -v pdsh >/dev/null || stop "pdsh is not here; install it, or use launch/mpi.sh"
    wrong=$(without_comments "$HOSTFILE" | awk 'NF && $2 !~ /^slots=/ {print NR ": " $0; exit}')
    [[ ! $wrong ]] || stop "DeepSpeed needs slots=N behind each machine's name, got line $wrong in $HOSTFILE"
    readarray -t all < <(machines "$HOSTFILE")
    nodes=${NODES:-${#all[@]}}
    ((nodes <= ${#all[@]})) || stop "NODES must be <= the ${#all[@]} machines of $HOSTFILE, got $nodes"
    reached "${all[@]:0:nodes}"
    where=(--hostfile "$HOSTFILE" --num_nodes "$nodes" --force_multi)
elif ((${NODES:-1} > 1)); then
    stop "NODES=$NODES needs HOSTFILE, a file like cluster/hostfile.example"
fi
export PDSH_RCMD_TYPE=ssh PATH="$(dirname "$python"):$PATH"
exec "$python" -m deepspeed.launcher.runner "${where[@]}" \
    --master_port "${MASTER_PORT:-$((20000 + RANDOM % 10000))}" "$project/train.py" "${FLAGS[@]}"
