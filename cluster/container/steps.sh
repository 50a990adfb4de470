#!/bin/bash
# steps.sh - what Dockerfile and looksam.def both run, as root in an image of Debian or Ubuntu:
# Debian packages, .venv/ with torch and DeepSpeed, Horovod.
#
# The project lies in /opt/dist_looksam, or wherever this file is. TORCH as for cluster/setup.sh.
# HOROVOD=0 leaves Horovod out; without NCCL's headers its reductions are MPI's and gloo's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PACKAGES=(python3 python3-venv python3-dev gcc g++ make cmake libc6-dev libjpeg-dev
    openmpi-bin libopenmpi-dev openssh-client pdsh ca-certificates)

[[ $EUID == 0 ]] || { echo "steps.sh: must be root, in an image; use cluster/setup.sh elsewhere" >&2 && exit 2; }
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install -y --no-install-recommends "${PACKAGES[@]}" >/dev/null
bash cluster/setup.sh

# Kernels of DeepSpeed and Horovod are compiled by BASE's nvcc and linked to TORCH's CUDA.
cuda=$(.venv/bin/python -c 'import torch; print(torch.version.cuda or "")')
toolkit=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p') || true
if [[ $cuda && $toolkit && ${cuda%%.*} != "${toolkit%%.*}" ]]; then
    echo "steps.sh: BASE must have the CUDA of TORCH, $cuda, got $toolkit; give another BASE or TORCH" >&2
    exit 2
fi

if [[ ${HOROVOD:-1} != 0 ]]; then
    [[ ! -e /usr/include/nccl.h ]] || export HOROVOD_GPU_OPERATIONS=NCCL
    bash cluster/horovod/build.sh
fi
rm -rf /var/lib/apt/lists/* ~/.cache/pip ~/.cache/dist_looksam
cd / # not from the project: what is installed must be found
DS_ACCELERATOR=cpu "$OLDPWD/.venv/bin/python" -c 'import deepspeed, dist_looksam'
"$OLDPWD/.venv/bin/dist-looksam" --version
