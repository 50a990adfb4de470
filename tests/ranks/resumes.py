"""What must hold of the checkpoints and continuations of a matrix (checkpoint_matrix.py)."""

from pathlib import Path

import task
import torch
from checkpoint_matrix import SGD, STEPS, WRITTEN, exact, result

from dist_looksam.checkpoint import Reader


def assert_goes_on(folder: Path, writer: tuple, reader: tuple) -> None:
    """The reader's weights are those of the reference, which nothing interrupted."""
    got = torch.load(result(folder, writer, reader), weights_only=True)
    truth = task.truth(*SGD.values(), steps=STEPS)
    assert got["looks"] == [r["look"] for r in truth.records[WRITTEN:]]
    assert task.worst(got["weights"], truth) < 1e-6


def assert_same_state(mine: Reader, one: Reader) -> None:
    """By value: a lost or shuffled g_v still trains, and its weights are not far off."""
    for name, p in task.net().named_parameters():
        for key in ("weight", *mine.keys):
            got, want = (r(name, key, 0, p.numel()) for r in (mine, one))
            assert float((got - want).abs().max()) < 1e-6, (name, key)
            assert key != "g_v" or float(want.abs().sum()) > 0


def assert_same_bits(folder: Path, number: int) -> None:
    """Of the case EXACT[number], interrupted and not."""
    whole, resumed = (
        torch.load(exact(folder, number, which), weights_only=True)
        for which in ("whole", "resumed")
    )
    assert whole["looks"][WRITTEN:] == resumed["looks"]
    assert whole["skipped"][WRITTEN:] == resumed["skipped"]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
