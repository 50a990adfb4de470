#!/bin/bash
# horovod.sh [HOROVODRUN OPTIONS] -- [FLAGS] - trains with Horovod; FLAGS go to train.py.
#
#   bash launch/horovod.sh -np 2 -- --optimizer look_layer_sam                 this machine, gloo
#   bash launch/horovod.sh -np 16 -H a:8,b:8 --network-interfaces eth1 -- ...  two machines, by ssh
#   bash launch/horovod.sh --mpi -np 16 -H a:8,b:8 -- ...                      the same over MPI
#   mpirun -np 16 .venv/bin/python train.py --backend horovod ...              without horovodrun
#   srun --mpi=pmix .venv/bin/python train.py --backend horovod ...            under SLURM, over MPI
# Elastic: workers may die and join while hosts.sh, run every second, prints one "host:slots" a line.
#   bash launch/horovod.sh -np 8 --min-np 4 --max-np 16 --host-discovery-script ./hosts.sh \
#       --network-interfaces eth1 -- --save_every 100 ...
# A lost worker costs the steps since the newest checkpoint, at most --save_every. Its whole host is
# not used again. batch_size must suit every number of ranks that may come about.
#
# Name the interface (--network-interfaces): without it Horovod looks for a common one, and waits for
# ever where it finds none. SECURITY: horovodrun's rendezvous server listens on all interfaces and
# unpickles what it is sent (CVE-2024-10190, not fixed in 0.28.1): whoever reaches its port runs code
# as you. Use it only where a firewall keeps strangers out of the cluster's network; mpirun has no
# such server.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -x .venv/bin/horovodrun ]] || {
    echo "horovod.sh: Horovod is not installed; build it: bash cluster/horovod/build.sh" >&2
    exit 2
}

options=()
while (($#)) && [[ $1 != -- ]]; do options+=("$1") && shift; done
(($#)) && shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/horovodrun "${options[@]}" "$PWD/.venv/bin/python" "$PWD/train.py" --backend horovod "$@"
