#!/bin/bash
# horovod.sh [HOROVODRUN OPTIONS] -- [FLAGS] - trains with Horovod; FLAGS go to train.py.
#
#   bash launch/horovod.sh --gloo -np 2 -- --optimizer look_layer_sam          this machine, gloo
#   bash launch/horovod.sh --gloo -np 16 -H a:8,b:8 --network-interfaces eth1 -- ...    two, by ssh
#   bash launch/horovod.sh --mpi -np 16 -H a:8,b:8 --network-interfaces eth1 -- ...     over MPI
#
# Without horovodrun, and under SLURM, use --backend horovod:
#   HOSTFILE=F bash launch/mpi.sh --backend horovod ...
#   MPI=pmix sbatch --nodes 8 launch/slurm.sbatch --backend horovod ...
#
# Variables: SITE, PYTHON as in cluster/README.md; all reach every worker. Every machine must
# see this folder under the same path.
#
# Elastic: workers may leave and join. hosts.sh, run every second, prints one "host:slots" a line.
#   bash launch/horovod.sh --gloo -np 8 --min-np 4 --max-np 16 \
#       --host-discovery-script ./hosts.sh --network-interfaces eth1 -- --save_every 100 ...
# After a lost worker the steps since the newest checkpoint, at most --save_every, are repeated. Its
# host is not used again. batch_size must be divisible by every possible number of ranks.
#
# Name the interface (--network-interfaces): without it Horovod looks for a common one, and waits
# without limit where there is none. SECURITY: horovodrun's rendezvous server listens on all interfaces
# and unpickles the data that it receives (CVE-2024-10190, not fixed in 0.28.1): any client of its port
# can run code as you. Use it only behind a firewall of the cluster's network; mpirun has no such
# server.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$project/launch/checks.sh"
horovodrun=$(dirname "${PYTHON:-$project/.venv/bin/python}")/horovodrun
[[ -x $horovodrun ]] || stop "Horovod is not installed; build it: bash cluster/horovod/build.sh"

options=() before=
while (($#)) && [[ $1 != -- ]]; do
    [[ $before != @(--hostfile|-hostfile) ]] || hostfile "$1"
    [[ $1 != @(--hostfile|-hostfile)=* ]] || hostfile "${1#*=}"
    options+=("$1") before=$1 && shift
done
((${#options[@]})) || stop "number of workers must be given, got no options; write: -np 2 -- FLAGS"
(($#)) || stop "flags of train.py must come after --, got no -- after: ${options[*]}"
shift
as_group "$@"
[[ -t 1 ]] || export TERM=dumb # Open MPI gives its ranks a terminal, even where there is none
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$horovodrun" "${options[@]}" bash "$project/launch/rank.sh" --backend horovod "${FLAGS[@]}"
