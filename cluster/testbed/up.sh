#!/bin/bash
# up.sh - a SLURM + MPI + ssh cluster of namespaces on this machine; see lib.sh for its settings.
# Run it again to bring back lost hosts and repair cables. If the start fails it
# shuts down.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
((EUID == 0)) || die "needs root: it makes network and process namespaces"
for program in slurmctld slurmd munged sshd pdsh mpirun ip nsenter pgrep; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null ||
        die "$program is missing: bash cluster/setup.sh --all"
done
umask 022
started=
trap '[[ $started ]] || { say "could not come up: taking it down"; "$here/down.sh"; }' EXIT
trap 'exit 130' INT TERM

install -d "$STATE"/{etc/slurm,pid,wire,log,ssh,work,slurmctld}
echo "$NODES" >"$STATE/size"

write_names() {
    echo "127.0.0.1 localhost"
    for host in $(hosts); do echo "$(address "$host") $host"; done
}

# One key for the user, known to all hosts; one key per host, known to all hosts.
write_ssh() {
    local host folder
    [[ -s $STATE/etc/id ]] || ssh-keygen -q -t ed25519 -N '' -C testbed -f "$STATE/etc/id"
    for host in $(hosts); do
        folder=$STATE/ssh/$host
        install -d "$folder"
        [[ -s $folder/host_key ]] || ssh-keygen -q -t ed25519 -N '' -C "$host" -f "$folder/host_key"
        echo "$host,$(address "$host") $(cut -d' ' -f1,2 "$folder/host_key.pub")"
    done >"$STATE/etc/known_hosts"
    for host in $(hosts); do
        folder=$STATE/ssh/$host
        cp -p "$STATE/etc/id" "$STATE/etc/id.pub" "$folder/"
        cp "$STATE/etc/id.pub" "$folder/authorized_keys"
        cp "$STATE/etc/known_hosts" "$folder/ssh_known_hosts"
        cp "$here/sshd_config" "$here/ssh_config" "$folder/"
    done
}

write_slurm() {
    sed -e "s|@STATE@|$STATE|; s|@NODES@|$NODES|; s|@CPUS@|$CPUS|; s|@GPUS@|$GPUS|" \
        "$here/slurm.conf.in" >"$STATE/etc/slurm/slurm.conf"
    echo "Name=gpu File=/run/gpu/nvidia[0-$((GPUS - 1))]" >"$STATE/etc/slurm/gres.conf"
    # slurmd asks for a cgroup version even when it uses none
    echo "CgroupPlugin=cgroup/v1" >"$STATE/etc/slurm/cgroup.conf"
}

write_names >"$STATE/etc/hosts"
: >"$STATE/etc/resolv.conf"
[[ -s $STATE/etc/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom >"$STATE/etc/munge.key")
write_ssh
write_slurm

if [[ ! -e /run/netns/$SWITCH ]]; then
    ip netns add "$SWITCH"
    ip -n "$SWITCH" link set lo up
    ip -n "$SWITCH" link add br0 type bridge
    ip -n "$SWITCH" link set br0 up
fi
say "booting head and $NODES nodes"
for host in $(hosts); do
    boot "$host"
    fast "$host"
    replug "$host"
done

all_idle() { (($(on head sinfo -h -N -t idle,mix,alloc -o %N | sort -u | wc -l) == NODES)); }
until_ok 120 all_idle || die "SLURM did not come up: $(on head sinfo -h -N -l 2>&1 | tail -5)"
started=1
if [[ ${TESTBED_OWNER:-} && ! -e $STATE/owner ]]; then
    TESTBED_NAME=$NAME setsid bash -c 'tail --pid="$1" -f /dev/null; exec "$2/down.sh"' \
        testbed-owner "$TESTBED_OWNER" "$here" </dev/null >/dev/null 2>&1 &
    echo $! >"$STATE/owner"
fi
say "up: $NODES nodes; cluster/testbed/on.sh head sinfo"
