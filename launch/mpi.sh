#!/bin/bash
# mpi.sh [FLAGS] - train.py under mpirun, Open MPI or MPICH, over ssh.
#
#   HOSTFILE=cluster/hostfile launch/mpi.sh --optimizer look_layer_sam    # all slots of the file
#   HOSTFILE=cluster/hostfile RANKS=16 launch/mpi.sh ...                  # the first 16
#
# MPI only starts the ranks; gradients use torch's own transports. Every node must see this folder
# under the same path. Variables: SITE, PYTHON, CONTAINER as in cluster/README.md; MPIRUN, the name or
# path of mpirun (Debian's mpirun.mpich); MPI_FLAGS, more options for it; SSH_CHECK=no skips the check that
# all machines answer.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$project/launch/checks.sh"
MPIRUN=${MPIRUN:-mpirun}
command -v "$MPIRUN" >/dev/null || stop "$MPIRUN is not here; install Open MPI or MPICH, or use launch/torchrun.sh"
hostfile "${HOSTFILE:-}"
slots=$(slots "$HOSTFILE")
ranks=${RANKS:-$slots}
counted RANKS "$ranks"
((ranks <= slots)) || stop "RANKS must be <= the $slots slots of $HOSTFILE, got $ranks"
readarray -t all < <(machines "$HOSTFILE")
readarray -t others < <(printf '%s\n' "${all[@]}" | grep -vxE "localhost|127.0.0.1|$(hostname)")
reached "${others[@]}"
MASTER_ADDR=${MASTER_ADDR:-${all[0]#*@}} # without ssh's user
MASTER_PORT=${MASTER_PORT:-$((20000 + RANDOM % 10000))} # rank 0 reports a port in use
read -ra more <<<"${MPI_FLAGS:-}"

[[ -t 1 ]] || export TERM=dumb # Open MPI gives its ranks a terminal even if there is none
export MASTER_ADDR MASTER_PORT SITE=${SITE:-} PYTHON=${PYTHON:-} CONTAINER=${CONTAINER:-}
if "$MPIRUN" --version 2>&1 | grep -q "Open MPI"; then
    exec "$MPIRUN" --hostfile "$HOSTFILE" -np "$ranks" --bind-to none \
        -x TERM -x MASTER_ADDR -x MASTER_PORT -x SITE -x PYTHON -x CONTAINER "${more[@]}" \
        bash "$project/launch/rank.sh" "$@"
fi
hosts=$(with_slots "$HOSTFILE" | paste -sd ,)
exec "$MPIRUN" -hosts "$hosts" -n "$ranks" -prepend-rank \
    -genvlist MASTER_ADDR,MASTER_PORT,SITE,PYTHON,CONTAINER "${more[@]}" bash "$project/launch/rank.sh" "$@"
