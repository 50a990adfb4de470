#!/bin/bash
# mpi.sh [FLAGS] - train.py under mpirun, Open MPI or MPICH, over ssh.
#
#   HOSTFILE=cluster/hostfile launch/mpi.sh --optimizer look_layer_sam    # all slots of the file
#   HOSTFILE=cluster/hostfile RANKS=16 launch/mpi.sh ...                  # the first 16
#
# MPI only starts the ranks; gradients go by torch's own transports. Every node must see this folder
# under the same path. Variables: SITE, PYTHON as in cluster/README.md; MPI_FLAGS, more for mpirun.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stop() { echo "mpi.sh: $*" >&2 && exit 2; }
command -v mpirun >/dev/null || stop "mpirun is not here; install Open MPI or MPICH, or use launch/torchrun.sh"
[[ -s ${HOSTFILE:-} ]] || stop "HOSTFILE must name a file like cluster/hostfile.example, got '${HOSTFILE:-}'"

slots=$(awk '!/^ *(#|$)/ {n = 1; for (i = 2; i <= NF; i++) if (sub(/^slots=/, "", $i)) n = $i; s += n}
    END {print s + 0}' "$HOSTFILE")
MASTER_ADDR=${MASTER_ADDR:-$(awk '!/^ *(#|$)/ {print $1; exit}' "$HOSTFILE")}
MASTER_PORT=${MASTER_PORT:-$((20000 + RANDOM % 10000))} # rank 0 says so where it is taken
ranks=${RANKS:-$slots}
((ranks <= slots)) || stop "RANKS must be <= the $slots slots of $HOSTFILE, got $ranks"
read -ra more <<<"${MPI_FLAGS:-}"

[[ -t 1 ]] || export TERM=dumb # Open MPI gives its ranks a terminal, even where there is none
export MASTER_ADDR MASTER_PORT SITE=${SITE:-} PYTHON=${PYTHON:-}
if mpirun --version 2>&1 | grep -q "Open MPI"; then
    exec mpirun --hostfile "$HOSTFILE" -np "$ranks" --bind-to none \
        -x TERM -x MASTER_ADDR -x MASTER_PORT -x SITE -x PYTHON "${more[@]}" \
        bash "$project/launch/rank.sh" "$@"
fi
machines=$(mktemp)
trap 'rm -f "$machines"' EXIT
sed -E 's/^([^ #]+) +slots=([0-9]+).*/\1:\2/' "$HOSTFILE" >"$machines"
mpirun -f "$machines" -n "$ranks" -prepend-rank -genvlist MASTER_ADDR,MASTER_PORT,SITE,PYTHON \
    "${more[@]}" bash "$project/launch/rank.sh" "$@"
