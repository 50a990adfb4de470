#!/bin/bash
# demo.sh [FLAGS] - sets up, trains a ViT with look_layer_sam on two ranks, shows the result.
#
# Its last line names the accuracy and the picture. FLAGS go to train.py and override those below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash cluster/setup.sh

ranks=2
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
data=fashion_mnist
[[ -e /usr/share/datasets/fashion-mnist ]] || data=digits

# A free port, because other programs often use the default, 29500.
port=$(.venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
PATH=$PWD/.venv/bin:$PATH
exec deepspeed --num_gpus "$ranks" --master_port "$port" train.py --zero_stage 2 \
    --optimizer look_layer_sam --data "$data" --epochs 6 --batch_size 256 --out runs/demo "$@"
