# testbed.sh - the cluster of cluster/testbed/: many nodes on a few cores, no GPU.
export GLOO_SOCKET_IFNAME=eth0 HOROVOD_GLOO_IFACE=eth0
export OMP_NUM_THREADS=1 # the nodes share the machine's cores
export DS_ACCELERATOR=cpu
