# ethernet.sh - one network between the nodes, selected by the node's address in it.
#
# Without a setting gloo and NCCL guess an interface. On nodes with a management network, a container
# bridge or a VPN their guesses may differ, and the run hangs.
# NETWORK is the beginning of the addresses to use.
: "${NETWORK:=10.}"
interface=$(ip -o -4 addr show | awk -v net="$NETWORK" 'index($4, net) == 1 {print $2; exit}')
if [[ $interface ]]; then
    export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface
    export HOROVOD_GLOO_IFACE=$interface
else
    echo "$(hostname): no interface has an address $NETWORK*; set NETWORK in the site file" >&2
fi
export NCCL_IB_DISABLE=1 # no InfiniBand: do not look for it
