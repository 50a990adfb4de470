#!/bin/bash
# smoke.sh - checks that the running testbed has what the tests need of a cluster. Half a minute.
set -uo pipefail
. "$(dirname "$0")/checks.sh"
work=$STATE/scratch/smoke
rm -rf "$work"
install -d "$work"
cd "$work" || exit
last=node$NODES
ranks=$((2 * NODES))

head_() { on head timeout 100 "$@"; }
over() { ! head_ scontrol -o show job "$1" | grep -qE 'JobState=(PENDING|RUNNING|COMPLETING)'; }
script() { # script NAME LINE... - a batch script
    local name=$1
    shift
    printf '%s\n' '#!/bin/bash' "$@" >"$name"
}
batch() { # prints its output when it has ended
    local job
    job=$(head_ sbatch --parsable "$@") || return
    until_ok 60 over "$job"
    cat slurm-"$job"*.out
}
# Many hosts' lines, counted: the same line of N hosts is printed as "N line".
counted() { sort -u | wc -l; }

hosts_of_srun() { head_ srun -N"$NODES" hostname | counted; }
hosts_of_pdsh() { head_ pdsh -R ssh -w "node[1-$NODES]" hostname | counted; }
hosts_of_mpirun() { head_ mpirun --hostfile hosts -np "$ranks" hostname 2>/dev/null | counted; }
for host in $(hosts | tail -n +2); do echo "$host slots=2"; done >hosts

check "SLURM: all nodes idle" "^$NODES idle" head_ sinfo -h -o '%D %t'
check "srun: every node once" "^$NODES$" hosts_of_srun
check "GPUs claimed, not real" "0,1,2,3,4,5,6,7" \
    head_ srun --gpus-per-node=8 bash -c 'echo $CUDA_VISIBLE_DEVICES'
script size.sbatch '#SBATCH -N2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --mem=200G' \
    'srun bash -c "echo rank \$SLURM_PROCID"'
check "sbatch: a script of real size" "rank 15" batch size.sbatch
script array.sbatch '#SBATCH --array=1-4%2' 'echo "element $SLURM_ARRAY_TASK_ID"'
check "sbatch: an array" "element 4" batch array.sbatch

script told.sbatch '#SBATCH -N2 --ntasks-per-node=1' \
    'srun bash -c "trap \"echo told; exit\" USR1; echo here; while :; do sleep 0.2; done"'
signal() {
    local job
    job=$(head_ sbatch --parsable told.sbatch)
    until_ok 20 bash -c "(( \$(grep -c here slurm-$job.out) == 2 ))"
    head_ scancel -s USR1 "$job"
    until_ok 20 over "$job"
    cat "slurm-$job.out"
}
check "scancel --signal reaches the steps" "told.*told" signal
check "ssh from any host to any other" "^node1$" on "$last" ssh node1 hostname
check "pdsh over ssh" "^$NODES$" hosts_of_pdsh
check "mpirun over ssh" "^$NODES$" hosts_of_mpirun

if has mpi4py; then
    echo 'from mpi4py.MPI import COMM_WORLD as c; print("sum", c.allreduce(1), flush=True)' >mpi.py
    check "mpi4py under mpirun" "sum $ranks" \
        head_ mpirun --hostfile hosts -np "$ranks" "$PY" mpi.py
    check "mpi4py under srun --mpi=pmix" "sum $NODES" \
        head_ srun --mpi=pmix -N"$NODES" "$PY" mpi.py
fi
if has torch; then
    cat >sum.py <<-'END'
	import torch, torch.distributed as dist
	dist.init_process_group("gloo")
	ones = torch.ones(1)
	dist.all_reduce(ones)
	print("sum", int(ones), flush=True)
	dist.destroy_process_group()
	END
    script torchrun.sbatch "#SBATCH -N2 --ntasks-per-node=1" \
        'export GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1' \
        "srun $PY -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d \
        --rdzv-endpoint \$(scontrol show hostnames | head -1):29500 --rdzv-id \$SLURM_JOB_ID sum.py"
    check "sbatch, srun, torchrun: an all-reduce" "sum 2" batch torchrun.sbatch
fi

script again.sbatch "#SBATCH -w node1,$last -N2 --ntasks-per-node=1 --requeue --open-mode=append" \
    '((${SLURM_RESTART_COUNT:-0})) || srun bash -c "echo started; sleep 60"' \
    'echo "try $SLURM_RESTART_COUNT"'
loses_a_node() {
    local job
    job=$(head_ sbatch --parsable again.sbatch)
    until_ok 20 bash -c "(( \$(grep -c started slurm-$job.out) == 2 ))"
    powercut "$last"
    until_ok 60 bash -c "'$here/on.sh' head squeue -h -j $job -o %T | grep -q PENDING"
    restart "$last"
    until_ok 60 over "$job"
    cat "slurm-$job.out"
}
check "a node loses power: its job is requeued" "try 1" loses_a_node
slow_cable() {
    slow "$last" delay_ms=25
    on "$last" ping -c3 -i0.2 -q node1
    fast "$last"
}
check "a slow cable: twice 25 ms" "= 5[0-9]\.[0-9]+/" slow_cable
unplugged() {
    unplug "$last"
    on "$last" ping -c1 -W1 -q node1
    replug "$last"
    until_ok 5 on "$last" ping -c1 -W1 -q node1 && echo back
}
check "an unplugged cable, and back" "100% packet loss.*back" unplugged
check "no way out to the machine's network" "unreachable" on node1 ping -c1 -W1 192.0.2.1
verdict
