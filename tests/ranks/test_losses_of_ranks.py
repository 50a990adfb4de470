"""Every training loss on every backend, on 1, 2 and 3 ranks, against float64."""

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
ON = {1: ("plain",), 2: ("ddp", "zero", "fsdp2"), 3: ("ddp", "zero", "fsdp2")}
SGD = {"optimizer": "look_sam", "base": "sgd"}
CASES = {
    ranks: [
        {**SGD, "on": on, "flags": flags, "name": f"{ranks}-{on}-{name}"}
        for on in backends
        for name, flags in LOSSES.items()
        if on == "plain"
        or (on, name) == ("ddp", "bce")
        or name == ("bce", "balanced")[ranks == 3]
        or (ranks, on, name) in [(2, "ddp", "bce0"), (2, "fsdp2", "balanced")]
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
    return (rows > 0).astype(float) if name == "bce0" else 0.9 * rows + 0.1 / 3


def of_logits(x: np.ndarray, t: np.ndarray, name: str) -> tuple[float, np.ndarray]:
    """The loss of logits and targets [n, classes], and its gradient."""
    n, classes = x.shape
    if name.startswith("bce"):
        yes = 1 / (1 + np.exp(-x))
        value = -(t * np.log(yes) + (1 - t) * np.log(1 - yes)).mean()
        return float(value), (yes - t) / (n * classes)
    counts = np.array(list(losses_worker.COUNTS.values()))
    t = t * counts.sum() / (classes * counts)  # inversely proportional; 1 on average of samples
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    return float(-(t * np.log(p)).sum() / n), (t.sum(1, keepdims=True) * p - t) / n


def gradient(weights: list, step: int, name: str) -> tuple[float, list]:
    net = task.net().double()
    with torch.no_grad():
        for p, w in zip(net.parameters(), weights, strict=True):
            p.copy_(torch.from_numpy(w))
    logits = net(task.batch(step)[0].double())
    value, by_logits = of_logits(logits.detach().numpy(), targets(step, name), name)
    logits.backward(torch.from_numpy(by_logits))
    return value, [p.grad.numpy() for p in net.parameters()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("losses")
    (place / "cases.json").write_text(json.dumps(CASES))
    run([sys.executable, str(HERE / "losses_worker.py"), str(place)], 600, {})
    return place


@pytest.fixture(scope="module")
def truths():
    start = list(task.net().parameters())
    groups = [
        {"layers": [i for i, p in enumerate(start) if (p.ndim > 1) == matrix], **how}
        for matrix, how in (
            (True, {"weight_decay": task.SETTINGS["decay"], "lr": task.LR}),
            (False, {"weight_decay": 0.0, "lr": task.SMALLER_LR}),
        )
    ]
    names = ("k", "alpha", "eps")
    return {
        name: reference.train(
            [p.detach().double().numpy() for p in start],
            lambda w, t, name=name: gradient(w, t, name),
            groups=groups,
            steps=task.STEPS,
            rho=task.RHO["model"],
            lr=task.LR,
            batch_size=task.BATCH,
            **SGD,
            **{n: task.SETTINGS[n] for n in names},
        )
        for name in LOSSES
    }


@pytest.mark.parametrize("name", [case["name"] for of_ranks in CASES.values() for case in of_ranks])
def test_the_loss_of_the_global_batch_is_trained_whatever_ranks_and_micro_batches(
    folder, truths, name
):
    got = torch.load(folder / f"{name}.pt", weights_only=True)
    want = truths[name.split("-")[-1]]
    assert task.worst(got["weights"], want) < 1e-6
    assert got["losses"] == pytest.approx([row["loss"] for row in want.records], abs=1e-6)


def test_the_losses_lead_to_different_weights(truths):
    """Else the tests above would not tell them apart."""
    last = [np.concatenate([w.ravel() for w in t.weights[-1]]) for t in truths.values()]
    plain = task.truth("look_sam", "sgd").weights[-1]
    last.append(np.concatenate([w.ravel() for w in plain]))
    for i, one in enumerate(last):
        assert all(np.abs(one - other).max() > 1e-3 for other in last[:i])
