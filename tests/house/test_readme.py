"""The first code that a user copies must train."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_looksam import Engine, LookSAM

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


def test_the_loops_before_and_after_on_the_page_take_the_same_steps():
    """Where nothing looks, the page's loop with Engine is its loop without: autocast, accumulation,
    clipping and schedule. Nothing told what to leave out of a loop."""
    page = (ROOT / "docs" / "loop.md").read_text().split("## A loop with accumulation")[1]
    before, after = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:2]
    x, y = digits()

    def trained(code: str) -> list[torch.Tensor]:
        model = net(0)
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        names = {"torch": torch, "model": model, "base": base, "LookSAM": LookSAM}
        names |= {"Engine": Engine, "criterion": nn.CrossEntropyLoss()}
        names["scheduler"] = torch.optim.lr_scheduler.StepLR(base, 1, 0.8)
        parts = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 384, 32)]
        names["loader"] = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        exec(compile(code, "loop.md", "exec"), names)
        return [*model.state_dict().values()]

    after = after.replace("k=5", "k=5, look_from=100")
    pairs = zip(trained(before.replace('"cuda"', '"cpu"')), trained(after), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
