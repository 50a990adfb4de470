"""The first code that a user copies must train."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EPOCHS, BATCH = 6, 128


def snippet() -> str:
    """README's, "In your own code": the imports, the optimizer, the closure and the step."""
    section = (ROOT / "README.md").read_text().split("## In your own code")[1]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]


def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def accuracy(step, model, x, y) -> float:
    """On the last 360 images, after some epochs over the rest."""
    train = len(x) - 360
    for epoch in range(EPOCHS):
        order = torch.randperm(train, generator=torch.Generator().manual_seed(epoch))
        for some in order.split(BATCH):
            step(x[some], y[some])
    with torch.no_grad():
        return float((model(x[train:]).argmax(1) == y[train:]).float().mean())


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_readmes_snippet_is_not_far_below_adamw(seed):
    """Its class defaults, the paper's for its large batches, gave 40.6 % where AdamW had 78.9 on a
    ViT, and here 2 to 3 points less than AdamW."""
    x, y = digits()
    model = net(seed)
    names = {"torch": torch, "model": model, "criterion": nn.CrossEntropyLoss(), "x": x, "y": y}
    before, step = snippet().split("loss = optimizer.step(closure)")
    assert not step.strip()
    exec(compile(before, "README.md", "exec"), names)

    def of_readme(some, labels):
        names.update(x=some, y=labels)
        names["optimizer"].step(names["closure"])

    plain = net(seed)
    adamw = torch.optim.AdamW(plain.parameters(), lr=names["base"].param_groups[0]["lr"])

    def of_adamw(some, labels):
        adamw.zero_grad()
        nn.functional.cross_entropy(plain(some), labels).backward()
        adamw.step()

    got, want = accuracy(of_readme, model, x, y), accuracy(of_adamw, plain, x, y)
    assert got > want - 0.02, (got, want)
