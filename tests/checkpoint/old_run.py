"""The run whose checkpoint lies in old/, made by commit 2b4ea09:

PYTHONPATH=CHECKOUT_OF_2b4ea09 python tests/checkpoint/old_run.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from dist_looksam import Engine, Lamb, LookLayerSAM, LookSAM
from dist_looksam.checkpoint import Writer

OLD = Path(__file__).parent / "old"
BEFORE, STEPS, K = 3, 8, 4  # saved in the middle of a cycle


def loss(model, batch):
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def engine(method: str) -> Engine:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    if method == "look_sam":
        base = torch.optim.AdamW(net.parameters(), lr=0.02, eps=1e-4)
        return Engine(net, LookSAM(net.parameters(), base, rho=0.05, alpha=0.7, k=K), loss)
    base = Lamb(net.parameters(), lr=0.02, weight_decay=0.05, eps=1e-4)
    return Engine(net, LookLayerSAM(net.parameters(), base, rho=0.005, alpha=0.7, k=K), loss)


def train(engine: Engine, begin: int, end: int) -> None:
    for t in range(begin, end):
        drawn = torch.Generator().manual_seed(t)
        images, labels = torch.randn(12, 5, generator=drawn), torch.arange(12) % 3
        engine.step([(images[:6], labels[:6]), (images[6:], labels[6:])])


def main() -> None:
    torch.set_num_threads(1)
    for method in ("look_sam", "look_layer_sam"):
        made = engine(method)
        train(made, 0, BEFORE)
        writer = Writer(made.backend, OLD / method)
        writer.save(BEFORE, {"epoch": 1, "passes": made.passes})
        writer.wait()
        writer.close()
        train(made, BEFORE, STEPS)
        save_file(made.module.state_dict(), OLD / method / "end.safetensors")


if __name__ == "__main__":
    main()
