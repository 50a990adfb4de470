#!/bin/bash
# faults.sh - checks gloo on the running testbed after a lost process, cable or host. A minute.
set -uo pipefail
. "$(dirname "$0")/checks.sh"
has torch || die "needs a Python with torch: PY=/path/to/python"
((NODES >= 3)) || die "needs 3 nodes"
work=$STATE/scratch/faults
install -d "$work"
cd "$work" || exit

# during TIMEOUT SECONDS FAULT - three ranks on node1-3 all-reduce while FAULT happens to them.
during() {
    local timeout=$1 seconds=$2 fault=$3 k ranks=()
    rm -f ready-*
    for k in 0 1 2; do
        on "node$((k + 1))" RANK=$k WORLD_SIZE=3 MASTER_ADDR=node1 MASTER_PORT=29555 \
            GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 \
            timeout 120 "$PY" "$here/faults.py" "$timeout" "$seconds" 2>/dev/null &
        ranks+=($!)
    done
    until_ok 60 test -s ready-0 -a -s ready-1 -a -s ready-2 || echo "the ranks did not start"
    $fault
    wait "${ranks[@]}"
}
nothing() { :; }
a_process_dies() { on node3 bash -c 'kill -KILL "$(<ready-2)"'; }
a_cable_is_out_for_4_seconds() {
    unplug node3
    sleep 4
    replug node3
}
a_host_loses_power() { powercut node3; }

check "nothing: all finish" "finished.*finished.*finished" during 10 3 nothing
check "a dead process: its peers raise at once" "raised after 0\.[0-9] s" during 60 60 a_process_dies
check "a cable out for 4 s: training goes on" "stalled.*finished" \
    during 30 10 a_cable_is_out_for_4_seconds
check "a host without power: its peers raise at the timeout" "raised after 1[0-2]\.[0-9] s" \
    during 10 60 a_host_loses_power
restart node3
verdict
