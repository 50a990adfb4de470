# lib.sh - the testbed's settings and commands; sourced by the other scripts, never run.
#
# A host (head, node1 .. nodeN) is a set of namespaces: network, hostname, mounts, IPC, processes.
# Its PID 1 is host.sh. The hosts are connected to a bridge in a separate network namespace, isolated
# from the machine's network.
#
# TESTBED_NAME   name that distinguishes testbeds of one machine; default: from this checkout's path
# TESTBED_NODES  compute nodes (8)
# TESTBED_CPUS   CPUs a node claims to have (64); they are shared, as is all memory
# TESTBED_GPUS   GPUs a node claims to have (8); device files only
# TESTBED_SHARE  more folders under /tmp that all hosts see; the rest of /tmp is each host's own.
#                Everything outside /tmp is shared, as on a cluster with a network file system.
# TESTBED_OWNER  a process id: when that process has ended, the testbed shuts down
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(cd "$here/../.." && pwd)
NAME=${TESTBED_NAME:-$(cksum <<<"$project" | cut -d' ' -f1)}
NODES=${TESTBED_NODES:-8}
CPUS=${TESTBED_CPUS:-64}
GPUS=${TESTBED_GPUS:-8}
STATE=/tmp/looksam-testbed-$NAME # configuration, keys, logs, process ids, and work/ for jobs
NS=looksam-$NAME                 # prefix of the network namespaces
SWITCH=$NS-switch                # the namespace that holds the bridge
SUBNET=10.77.0                   # nodeK is $SUBNET.K, head is $SUBNET.254
SHARE="$project $STATE ${TESTBED_SHARE:-}"

# A running testbed keeps the size of its start.
[[ ! -s $STATE/size ]] || NODES=$(<"$STATE/size")

say() { printf 'testbed: %s\n' "$*"; }
die() {
    printf 'testbed: %s\n' "$*" >&2
    exit 1
}
hosts() { echo head && seq -f 'node%g' 1 "$NODES"; }
address() { [[ $1 == head ]] && echo "$SUBNET.254" || echo "$SUBNET.${1#node}"; }
running() { [[ -s $STATE/pid/$1 ]] && kill -0 "$(<"$STATE/pid/$1")" 2>/dev/null; }

# until_ok SECONDS COMMAND... - try COMMAND until it succeeds, or SECONDS have passed.
until_ok() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}
not() { ! "$@"; }

# on HOST COMMAND... - run COMMAND there, in this folder, with what a login would have set.
# Every user in the testbed is root, which Open MPI must allow explicitly.
on() {
    local host=$1
    shift
    running "$host" || die "$host is not running: cluster/testbed/up.sh"
    nsenter -t "$(<"$STATE/pid/$host")" -m -u -i -n -p --wdns="$PWD" -- env -i \
        HOME="$HOME" USER=root LOGNAME=root SHELL=/bin/bash LANG=C.UTF-8 TERM="${TERM:-dumb}" \
        OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
}

# cable HOST - a network namespace for HOST, whose eth0 ends in the bridge.
cable() {
    local host=$1 ns=$NS-$1
    [[ ! -e /run/netns/$ns ]] || return 0
    ip netns add "$ns"
    ip -n "$SWITCH" link add "p-$host" type veth peer name eth0 netns "$ns"
    ip -n "$SWITCH" link set "p-$host" master br0 up
    ip netns exec "$ns" sysctl -qw net.ipv6.conf.all.disable_ipv6=1 2>/dev/null || true
    ip -n "$ns" link set lo up
    ip -n "$ns" addr add "$(address "$host")/24" dev eth0
    ip -n "$ns" link set eth0 up
}

# boot HOST - start its namespaces and, in them, its daemons.
boot() {
    local host=$1 outside console=$STATE/log/$1.console
    ! running "$host" || return 0
    cable "$host"
    : >"$console"
    # Nothing of the caller's (pipes of a CI job, variables) may stay open or leak into the daemons.
    setsid nsenter --net="/run/netns/$NS-$host" \
        unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc \
        env -i HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        TESTBED_NAME="$NAME" TESTBED_GPUS="$GPUS" TESTBED_SHARE="${TESTBED_SHARE:-}" \
        bash "$here/host.sh" "$host" </dev/null >"$console" 2>&1 &
    outside=$!
    until_ok 60 pgrep -P "$outside" || die "$host did not start: $(tail -3 "$console")"
    pgrep -P "$outside" >"$STATE/pid/$host"
    until_ok 60 grep -qx ready "$console" || die "$host did not get ready: $(tail -3 "$console")"
}

# Ways to lose a host, and to restore it.
crash() { # its processes end at once and connections are closed; its cable stays connected
    running "$1" || return 0
    local pid
    pid=$(<"$STATE/pid/$1")
    rm -f "$STATE/pid/$1"
    kill -KILL "$pid"
    until_ok 10 not kill -0 "$pid"
}
unplug() { ip -n "$SWITCH" link set "p-$1" down; } # frames are lost without an error
replug() { ip -n "$SWITCH" link set "p-$1" up; }
powercut() { unplug "$1" && crash "$1"; } # without closing connections
restart() { replug "$1" && boot "$1"; }

# slow HOST [delay_ms=20] [jitter_ms=5] [loss=0.01] [rate_mbit=100] - a worse cable, both ways;
# fast HOST - the good one again. wire.py carries the frames.
slow() {
    local host=$1
    shift
    fast "$host"
    ip netns exec "$SWITCH" setsid python3 "$here/wire.py" "a-$host" "b-$host" "$@" \
        </dev/null >"$STATE/log/wire-$host" 2>&1 &
    echo $! >"$STATE/wire/$host"
    until_ok 10 ip -n "$SWITCH" link show "b-$host" || die "$(tail -1 "$STATE/log/wire-$host")"
    ip -n "$SWITCH" link add "br-$host" type bridge
    ip -n "$SWITCH" link set "a-$host" master "br-$host" up
    ip -n "$SWITCH" link set "b-$host" master br0 up
    ip -n "$SWITCH" link set "br-$host" up
    ip -n "$SWITCH" link set "p-$host" master "br-$host"
}
fast() {
    local wire=$STATE/wire/$1
    [[ -s $wire ]] || return 0
    ip -n "$SWITCH" link set "p-$1" master br0
    kill "$(<"$wire")" 2>/dev/null || true
    rm -f "$wire"
    ip -n "$SWITCH" link del "br-$1" 2>/dev/null || true
    until_ok 5 not ip -n "$SWITCH" link show "b-$1"
}
