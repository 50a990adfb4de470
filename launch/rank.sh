#!/bin/bash
# rank.sh [FLAGS] - one rank of train.py, started by srun or mpirun on every node.
#
# It first sources SITE, which may set PYTHON and RUN (see cluster/README.md). CONTAINER, an
# Apptainer image, runs Python in it: that of cluster/container/, where PYTHON names no other.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
trap '' USR1 USR2 # a scheduler's warning must not end a rank that is still starting
. "$project/launch/checks.sh"
in_container
[[ -z ${SITE:-} ]] || . "$SITE"
exec "${RUN[@]}" "${PYTHON:-$project/.venv/bin/python}" "$project/train.py" "$@"
