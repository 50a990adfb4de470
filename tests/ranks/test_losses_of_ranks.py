"""Every training loss, and all that variants of ViT have, on every backend: against float64."""

import json
import sys

import losses_worker
import numpy as np
import pytest
import reference
import task
import torch

from launch import HERE, run

pytestmark = pytest.mark.needs("deepspeed")

SMOOTH = ["--label_smoothing", "0.1"]
LOSSES = {
    "bce": ["--loss", "bce", *SMOOTH],
    "bce0": ["--loss", "bce", "--bce_target_thresh", "0"],
    "balanced": ["--class_weights", "balanced", *SMOOTH],
}
SGD = {"optimizer": "look_sam", "base": "sgd"}
FLAGS = LOSSES | {"vit": []}  # look_layer_sam on LAMB
ON = {1: ("plain",), 2: ("ddp", "zero", "fsdp2"), 3: ("ddp", "zero", "fsdp2")}


def method(name: str) -> dict:
    return SGD if name != "vit" else {"optimizer": "look_layer_sam", "base": "lamb", "net": "vit"}


CASES = {
    ranks: [
        {**method(name), "on": on, "flags": flags, "name": f"{ranks}-{on}-{name}"}
        for on in backends
        for name, flags in FLAGS.items()
        if on == "plain"
        or (on, name) == ("ddp", "bce")
        or name == ("bce", "balanced")[ranks == 3]
        or (ranks, on, name) in [(2, "ddp", "bce0"), (2, "fsdp2", "balanced")]
        or name == "vit"
    ]
    for ranks, backends in ON.items()
}


def targets(step: int, name: str) -> np.ndarray:
    """Row i: lam of the own label, the rest of the neighbour's; smoothed, or 1 where above 0."""
    labels, lam = task.batch(step)[1].numpy(), losses_worker.shares(step).double().numpy()
    rows = np.zeros((task.BATCH, 3))
    for i, label in enumerate(labels):
        rows[i, label] += lam[i]
        rows[i, labels[i ^ 1]] += 1 - lam[i]
    if "--label_smoothing" in FLAGS[name]:
        return 0.9 * rows + 0.1 / 3
    return (rows > 0).astype(float) if name == "bce0" else rows


def of_logits(x: np.ndarray, t: np.ndarray, name: str) -> tuple[float, np.ndarray]:
    """The loss of logits and targets [n, classes], and its gradient."""
    n, classes = x.shape
    if name.startswith("bce"):
        yes = 1 / (1 + np.exp(-x))
        value = -(t * np.log(yes) + (1 - t) * np.log(1 - yes)).mean()
        return float(value), (yes - t) / (n * classes)
    if name == "balanced":
        counts = np.array(list(losses_worker.COUNTS.values()))
        t = t * counts.sum() / (classes * counts)  # inversely proportional; mean 1 over samples
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    return float(-(t * np.log(p)).sum() / n), (t.sum(1, keepdims=True) * p - t) / n


def net_of(name: str) -> torch.nn.Module:
    return losses_worker.vit() if name == "vit" else task.net()


def gradient(weights: list, step: int, name: str) -> tuple[float, list]:
    net = net_of(name).double()
    with torch.no_grad():
        for p, w in zip(net.parameters(), weights, strict=True):
            p.copy_(torch.from_numpy(w))
    images = losses_worker.images(step) if name == "vit" else task.batch(step)[0]
    logits = net(images.double())
    value, by_logits = of_logits(logits.detach().numpy(), targets(step, name), name)
    logits.backward(torch.from_numpy(by_logits))
    return value, [p.grad.numpy() for p in net.parameters()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("losses")
    (place / "cases.json").write_text(json.dumps(CASES))
    run([sys.executable, str(HERE / "losses_worker.py"), str(place)], 600, {})
    return place


def truth(name: str) -> reference.Result:
    start = list(net_of(name).parameters())
    groups = [
        {"layers": [i for i, p in enumerate(start) if (p.ndim > 1) == matrix], **how}
        for matrix, how in (
            (True, {"weight_decay": task.SETTINGS["decay"], "lr": task.LR}),
            (False, {"weight_decay": 0.0, "lr": task.SMALLER_LR}),
        )
    ]
    how = {n: task.SETTINGS[n] for n in ("k", "alpha", "eps")}
    how |= {n: method(name)[n] for n in ("optimizer", "base")}
    return reference.train(
        [p.detach().double().numpy() for p in start],
        lambda w, t: gradient(w, t, name),
        groups=groups,
        steps=task.STEPS,
        rho=task.RHO["layer" if name == "vit" else "model"],
        lr=task.LR,
        batch_size=task.BATCH,
        **how,
    )


@pytest.fixture(scope="module")
def truths():
    return {name: truth(name) for name in FLAGS}


@pytest.mark.parametrize("name", [case["name"] for of_ranks in CASES.values() for case in of_ranks])
def test_the_loss_of_the_global_batch_is_trained_whatever_ranks_and_micro_batches(
    folder, truths, name
):
    got = torch.load(folder / f"{name}.pt", weights_only=True)
    kind = name.split("-")[-1]
    limit = task.tolerance(method(kind)["optimizer"], method(kind)["base"])
    layers = [n for n, _ in net_of(kind).named_parameters()]
    for layer, want in zip(layers, truths[kind].weights[-1], strict=True):
        assert np.abs(got["weights"][layer].double().numpy() - want).max() < limit, layer
    losses = [row["loss"] for row in truths[kind].records]
    assert got["losses"] == pytest.approx(losses, abs=1e-6 if limit < 1e-5 else 1e-4)


def test_the_losses_lead_to_different_weights(truths):
    """Else the tests above would not tell them apart."""
    last = [np.concatenate([w.ravel() for w in t.weights[-1]]) for t in map(truths.get, LOSSES)]
    plain = task.truth("look_sam", "sgd").weights[-1]
    last.append(np.concatenate([w.ravel() for w in plain]))
    for i, one in enumerate(last):
        assert all(np.abs(one - other).max() > 1e-3 for other in last[:i])
