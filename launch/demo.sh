#!/bin/bash
# demo.sh [FLAGS] - sets up, trains a ViT with look_layer_sam on real images on two ranks, shows what came of it.
#
# FLAGS go to train.py and win over those below, e.g. `--epochs 10` or `--data digits`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash cluster/setup.sh

ranks=2 out=runs/demo
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
data=fashion_mnist
[[ -e /usr/share/datasets/fashion-mnist ]] || data=digits
for ((i = 1; i < $#; i++)); do [[ ${!i} != --out ]] || { j=$((i + 1)) && out=${!j}; }; done

.venv/bin/python -m torch.distributed.run --standalone --nproc_per_node "$ranks" train.py \
    --optimizer look_layer_sam --data "$data" --epochs 3 --batch_size 256 --out "$out" "$@"

.venv/bin/python - "$out" <<'END'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
summary = json.loads((out / "summary.json").read_text())
print(f"accuracy {summary['top1']:.2%} after {summary['seconds']:.0f} s; picture: {out / 'curves.png'}")
END
