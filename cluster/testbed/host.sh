#!/bin/bash
# host.sh HOST - process 1 of one host of the testbed: makes the host's own folders, starts its
# daemons, and collects ended processes. Started by lib.sh's `boot`.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
host=$1
log=$STATE/log/$host

mount --make-rprivate /
hostname "$host"
mount -t sysfs sysfs /sys # so that /sys/class/net shows this host's interfaces
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm

# /tmp is the host's own (PMIx and torchrun keep folders per job there), but for shared folders.
shared=()
for folder in $SHARE; do
    [[ $folder == /tmp/* && -d $folder ]] || continue
    install -d "/run/shared/${#shared[@]}"
    mount --bind "$folder" "/run/shared/${#shared[@]}"
    shared+=("$folder")
done
mount -t tmpfs -o mode=1777 tmpfs /tmp
for i in "${!shared[@]}"; do
    install -d "${shared[i]}"
    mount --move "/run/shared/$i" "${shared[i]}"
done

install -d /run/sshd /run/munge /run/slurm /run/spool /run/gpu
mount --bind "$STATE/etc/hosts" /etc/hosts
mount --bind "$STATE/etc/resolv.conf" /etc/resolv.conf
mount --bind "$STATE/etc/slurm" /etc/slurm
mount --bind "$STATE/ssh/$host" /etc/ssh
echo "$host" >/run/hostname
[[ ! -e /etc/hostname ]] || mount --bind /run/hostname /etc/hostname
ulimit -l unlimited -n 65536 2>/dev/null || true

munged --key-file="$STATE/etc/munge.key" --socket=/run/munge/munge.socket.2 \
    --pid-file=/run/munge/pid --seed-file=/run/munge/seed --log-file="$log.munged"
/usr/sbin/sshd -E "$log.sshd"
case $host in
    head) slurmctld -L "$log.slurmctld" ;;
    node*)
        for ((i = 0; i < GPUS; i++)); do mknod -m 666 "/run/gpu/nvidia$i" c 1 3; done
        slurmd -L "$log.slurmd"
        ;;
esac
echo ready
trap 'exit 0' TERM
while :; do # bash collects orphans while it waits
    sleep 3600 &
    wait $! || true
done
