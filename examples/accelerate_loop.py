"""LookSAM in a loop of Hugging Face Accelerate: `optimizer.step(closure)`.

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 examples/accelerate_loop.py     # DDP

The closure is called twice on looks. To clip, set `optimizer.clip` before `prepare`: it clips once
what the base optimizer gets. Refused: gradient_accumulation_steps above 1, whose micro-batches
would be lost, and "fp16", whose scaler unscales no pass: there let Engine do the step, as in
fabric_engine.py. accelerator.clip_grad_norm_ in the closure would clip each pass: leave it out.
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dist_looksam import LookSAM
from dist_looksam.cli.leave import leave

BATCH = 32  # samples of a step, over all ranks


def samples() -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(320, 16, generator=draw)
    return TensorDataset(images, images[:, :4].argmax(1))


def parts() -> tuple[nn.Module, LookSAM]:
    torch.manual_seed(0)  # the same weights on every rank
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
    base = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-6)
    optimizer = LookSAM(
        model.parameters(), base, rho=0.05, k=3, alpha=0.5, reuse="natural", model=model
    )
    optimizer.clip = 1.0
    return model, optimizer


def train(accelerator: Accelerator, epochs: int) -> nn.Module:
    loader = DataLoader(samples(), batch_size=BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(*parts(), loader)
    for _ in range(epochs):
        for images, labels in loader:

            def closure(images=images, labels=labels):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)  # Accelerate returns no loss
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", default="checkpoints", help="folder of the checkpoint")
    asked = parser.parse_args()
    accelerator = Accelerator(mixed_precision=asked.precision, cpu=asked.cpu)
    train(accelerator, epochs=3)
    accelerator.save_state(asked.out)  # the optimizer's state has g_v and the counters
    accelerator.end_training()
    leave(0)  # sys.exit(0), also where threads of gloo still run
