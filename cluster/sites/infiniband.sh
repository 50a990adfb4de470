# infiniband.sh - NCCL over InfiniBand, everything else (rendezvous, gloo) over IPoIB.
#
# NCCL_IB_HCA keeps NCCL off storage adapters: list the compute ones (`ibstat -l`).
export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5}
export NCCL_SOCKET_IFNAME=${INTERFACE:-ib0} GLOO_SOCKET_IFNAME=${INTERFACE:-ib0}
# Log the chosen transport; an unnoticed fallback to sockets is ten times slower.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
