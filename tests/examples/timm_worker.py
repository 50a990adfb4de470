"""Trains examples/timm_loop.py for an epoch, and again by a closure, and compares the weights.

python timm_worker.py FOLDER      where it draws its pictures
"""

import argparse
import importlib.util
import runpy
import sys
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_loop.py"
CPU = torch.device("cpu")


def let_torchvision_import() -> None:
    """Declare the two operators that importing torchvision looks up, where its library does not
    load because it is of another build of torch. Nothing here calls them."""
    spec = importlib.util.find_spec("torchvision")
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        for name in ("nms", "qnms"):
            arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", arguments)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sys.path.append(str(Path(sys.prefix) / "timm"))
    let_torchvision_import()
    example = argparse.Namespace(**runpy.run_path(str(EXAMPLE)))
    example.draw_pictures(folder)
    loader, classes = example.loader_of(folder, 32, CPU)
    batches = list(loader)
    assert len(batches) == 8 and batches[0][0].shape == (16, 3, 32, 32) and classes == 2

    name = "vit_tiny_patch16_224"
    engine, own = (example.engine_of(name, 32, classes, CPU, "fp32") for _ in range(2))
    example.train(engine, batches, epochs=1)
    assert engine.optimizer.steps == 4 and engine.passes == 6  # looks at 0 and 3
    model, optimizer = own.module, own.optimizer
    for step in range(4):

        def closure(pair=batches[2 * step : 2 * step + 2]):
            optimizer.zero_grad()
            total = sum(example.loss(model, batch) for batch in pair) / 2
            total.backward()
            return total

        optimizer.step(closure)
    for (name, a), b in zip(engine.module.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-5), name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
