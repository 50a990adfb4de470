"""A timm model with timm's data loader, trained by LookSAM in a plain loop.

    python examples/timm_loop.py                        # pictures that it draws itself, a small ViT
    python examples/timm_loop.py --data_dir DIR --model vit_small_patch16_224 --image_size 224

DIR holds train/CLASS/*. Nothing is downloaded. Engine does the step: accumulation, clipping, bf16.
timm's GradScaler (NativeScaler) and its clipping work on one pass: leave them out.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image
from timm import create_model
from timm.data import create_dataset, create_loader
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

from dist_looksam import Engine, LookSAM

MICRO_BATCH, ACCUMULATION = 16, 2


def draw_pictures(folder: Path) -> None:
    """Two classes of noise: reddish, and bluish."""
    draw = torch.Generator().manual_seed(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (folder / "train" / name).mkdir(parents=True)
        for i in range(64):
            pixels = torch.randint(0, 128, (32, 32, 3), generator=draw)
            pixels[..., channel] += 100
            Image.fromarray(pixels.byte().numpy()).save(folder / "train" / name / f"{i}.png")


def engine_of(name: str, size: int, classes: int, device: torch.device, precision: str) -> Engine:
    torch.manual_seed(0)
    small = {"img_size": size, "patch_size": 8} if name == "vit_tiny_patch16_224" else {}
    model = create_model(name, num_classes=classes, **small).to(device)
    groups = param_groups_weight_decay(model, 0.05)  # none for biases and norms
    base = torch.optim.AdamW(groups, lr=1e-3)
    optimizer = LookSAM(model.parameters(), base, rho=0.05, k=3, alpha=0.5, reuse="natural")
    return Engine(model, optimizer, loss=loss, clip=1.0, precision=precision)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(engine: Engine, loader, epochs: int) -> None:
    for epoch in range(epochs):
        micro_batches = []
        for images, labels in loader:  # create_loader normalises; on a GPU its prefetcher, too
            micro_batches.append((images, labels))
            if len(micro_batches) == ACCUMULATION:
                report = engine.step(micro_batches)
                micro_batches = []
        print(f"epoch {epoch}: loss {report.loss:.3f}")


def loader_of(folder: Path, size: int, device: torch.device):
    data = create_dataset("", root=str(folder), split="train", is_training=True)
    return create_loader(
        data,
        input_size=(3, size, size),
        batch_size=MICRO_BATCH,
        is_training=True,  # crops, flips, jitters; drops what does not fill a batch
        num_workers=2,
        use_prefetcher=device.type == "cuda",
        device=device,
    ), len(data.reader.class_to_idx)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, help="folder with train/CLASS/*")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as own:
        if asked.data_dir is None:
            asked.data_dir = Path(own)
            draw_pictures(asked.data_dir)
        loader, classes = loader_of(asked.data_dir, asked.image_size, device)
        engine = engine_of(asked.model, asked.image_size, classes, device, asked.precision)
        train(engine, loader, asked.epochs)


if __name__ == "__main__":
    main()
