"""LookSAM under Lightning's Trainer, with its automatic optimisation.

    python examples/lightning_trainer.py

The Trainer gives `optimizer.step` a closure, which LookSAM calls twice on looks: `training_step`
runs twice there, and a value that it logs is that of the second run. Checkpoints of the Trainer
hold LookSAM's state, and resume between two looks. (With torch's DataLoader, lightning 2.6 itself
trains on one batch twice after a resume, with any optimizer.)

To clip, set `optimizer.clip`, which clips once what the base optimizer gets. The Trainer's own
gradient_clip_val would clip each pass, and is refused, as are accumulation and "16-mixed": for
these see fabric_engine.py. Tested on one rank in fp32.
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dist_looksam import LookSAM


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Dropout(0.1), nn.Linear(32, 4)
        )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> LookSAM:
        base = torch.optim.AdamW(self.parameters(), lr=0.01)
        optimizer = LookSAM(
            self.parameters(), base, rho=0.05, k=3, alpha=0.5, reuse="natural", model=self.net
        )
        optimizer.clip = 1.0  # the gradient that AdamW gets, once
        return optimizer


def samples() -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(160, 16, generator=draw)
    return TensorDataset(images, images[:, :4].argmax(1))


def fit(steps: int, *, resume: str | None = None, **settings: object) -> Classifier:
    """A classifier after so many steps; with `resume`, continued from that checkpoint."""
    L.seed_everything(0, verbose=False)
    model = Classifier()
    how = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, **{**how, **settings})
    trainer.fit(model, DataLoader(samples(), batch_size=16), ckpt_path=resume)
    return model


if __name__ == "__main__":
    model = fit(60).eval()
    images, labels = samples().tensors
    print(f"accuracy {(model.net(images).argmax(1) == labels).float().mean():.2f}")
