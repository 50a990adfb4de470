"""Engine's step in a loop of Lightning Fabric: accumulation, clipping and 16 bits done right.

    python examples/fabric_engine.py                         # one process
    python examples/fabric_engine.py --devices 2             # two ranks: DDP

Fabric starts the ranks, names the device and splits the data. Engine gets the plain module: it
averages the gradients over the ranks by itself (DDP), once a pass, however many micro-batches. So
leave out fabric.setup(), fabric.backward() and fabric.clip_gradients(), which work on one pass.
"""

import argparse

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dist_looksam import Engine, LookSAM, restore
from dist_looksam.checkpoint import save
from dist_looksam.cli.leave import leave

BATCH, ACCUMULATION = 32, 2  # samples of a step, over all ranks; micro-batches of each rank


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def samples() -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(320, 16, generator=draw)
    return TensorDataset(images, images[:, :4].argmax(1))


def engine_of(device: torch.device, precision: str) -> Engine:
    torch.manual_seed(0)  # the same weights on every rank
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
    model.to(device)
    base = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-6)
    optimizer = LookSAM(model.parameters(), base, rho=0.05, k=3, alpha=0.5, reuse="natural")
    return Engine(model, optimizer, loss=loss, clip=1.0, precision=precision)


def train(fabric: L.Fabric, engine: Engine, epochs: int) -> None:
    micro_batch = BATCH // (fabric.world_size * ACCUMULATION)
    loader = fabric.setup_dataloaders(DataLoader(samples(), batch_size=micro_batch))
    for _ in range(epochs):
        micro_batches = []
        for batch in loader:
            micro_batches.append(batch)
            if len(micro_batches) == ACCUMULATION:
                report = engine.step(micro_batches)
                micro_batches = []
        fabric.print(f"step {report.step}: loss {report.loss:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    asked = parser.parse_args()
    fabric = L.Fabric(accelerator=asked.accelerator, devices=asked.devices)
    fabric.launch()
    engine = engine_of(fabric.device, asked.precision)
    train(fabric, engine, epochs=3)
    save(engine, "checkpoints")  # by all ranks
    restore(engine, "checkpoints")


if __name__ == "__main__":
    main()
    leave(0)  # sys.exit(0), also where threads of gloo still run
