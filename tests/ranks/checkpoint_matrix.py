"""Any to any: what R ranks of a backend write, R' ranks of another read, and go on as one run.

    PYTHONPATH=tests python tests/ranks/checkpoint_matrix.py          # R, R' in {1, 2, 3, 4}: 400
    PYTHONPATH=tests python tests/ranks/checkpoint_matrix.py --short  # every side, once

A backend is ddp (on one rank: plain) or a ZeRO stage, 0 to 3. Written in mid-cycle, after step 6;
read, compared bit for bit with what was written, g_v and all, and trained to step 12. The weights
then are held against tests/reference.py: 1e-6, since the base is SGD. And on the same ranks and
backend, in every precision, they are the bits of the run that was not interrupted.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import checkpoint_worker
import forks
import task
import torch

WRITTEN, STEPS = 7, 13  # with k = 3 a checkpoint at 7 is in mid-cycle: g_v is needed at 7 and 8
RANKS = (1, 2, 3, 4)
BACKENDS = ("ddp", 0, 1, 2, 3)
SIDES = list(product(RANKS, BACKENDS))
SGD = {"optimizer": "look_sam", "base": "sgd"}
ALL = list(product(SIDES, SIDES))
# Every number of ranks with every backend on both sides, once.
SHORT = [
    ((r, b), (RANKS[(j + i + 1) % len(RANKS)], BACKENDS[(i + 2 * j + 1) % 5]))
    for j, r in enumerate(RANKS)
    for i, b in enumerate(BACKENDS)
]
# (ranks, backend, settings) that must go on bit for bit.
EXACT = [
    *((r, b, {"optimizer": "look_layer_sam", "base": "adamw"}) for r in (2, 3) for b in BACKENDS),
    *((3, b, {"optimizer": "look_layer_sam"}) for b in ("ddp", 2)),
    *((2, b, {"optimizer": "look_layer_sam", "base": "adamw", "precision": p})
      for p in ("bf16", "fp16") for b in ("ddp", 1, 2, 3)),
    *((2, b, {"optimizer": "msam"}) for b in BACKENDS),
]  # fmt: skip


def written(folder: Path, side: tuple) -> Path:
    """The checkpoint that a side of the matrix has written."""
    return folder / "{}-{}".format(*side) / f"step-{WRITTEN}"


def result(folder: Path, writer: tuple, reader: tuple) -> Path:
    return folder / "{}-{}-to-{}-{}.pt".format(*writer, *reader)


def exact(folder: Path, number: int, which: str) -> Path:
    """Results of EXACT[number]: `which` is "whole" or "resumed"."""
    return folder / f"exact-{number}-{which}.pt"


def writing(folder: Path, ranks: int, bits: bool) -> Iterator[dict]:
    job = {"start": 0, "read": None, "write_at": WRITTEN}
    for side in SIDES:
        if side[0] == ranks:
            to = {"write": written(folder, side).parent, "steps": WRITTEN, "result": None}
            yield {**job, **SGD, **to, "backend": side[1]}
    for number, (r, backend, case) in enumerate(EXACT if bits else ()):
        if r == ranks:
            to = {"write": folder / f"exact-{number}", "steps": STEPS}
            to["result"] = exact(folder, number, "whole")
            yield {**job, **case, **to, "backend": backend}


def reading(folder: Path, ranks: int, pairs: list, bits: bool) -> Iterator[dict]:
    job = {"start": WRITTEN, "steps": STEPS, "write": None}
    for writer, reader in pairs:
        if reader[0] == ranks:
            of = {"read": written(folder, writer), "result": result(folder, writer, reader)}
            yield {**job, **SGD, **of, "backend": reader[1]}
    for number, (r, backend, case) in enumerate(EXACT if bits else ()):
        if r == ranks:
            of = {"read": folder / f"exact-{number}" / f"step-{WRITTEN}"}
            of["result"] = exact(folder, number, "resumed")
            yield {**job, **case, **of, "backend": backend}


def play_all(folder: Path, pairs: list, *, bits: bool) -> None:
    """All checkpoints, then all continuations: two starts for each number of ranks."""
    for ranks in RANKS:
        forks.play(folder, ranks, checkpoint_worker.run, list(writing(folder, ranks, bits)))
    for ranks in RANKS:
        jobs = list(reading(folder, ranks, pairs, bits))
        forks.play(folder, ranks, checkpoint_worker.run, jobs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="where all results stay")
    asked = parser.parse_args()
    pairs = SHORT if asked.short else ALL
    torch.set_num_threads(1)
    forks.load_deepspeed()
    folder = asked.folder or Path(tempfile.mkdtemp())
    play_all(folder, pairs, bits=True)
    truth = task.truth(*SGD.values(), steps=STEPS)
    far = {}
    for pair in pairs:
        got = torch.load(result(folder, *pair), weights_only=True)
        far[pair] = task.worst(got["weights"], truth)
    differ = [case for n, case in enumerate(EXACT) if not same_bits(folder, n)]
    worst = max(far, key=far.__getitem__)
    print(f"{len(pairs)} pairs, largest difference {far[worst]:.1e}, at {worst[0]} to {worst[1]}; "
          f"{len(EXACT)} cases held to the bit, {len(differ)} differ {differ or ''}")  # fmt: skip
    return 1 if differ or far[worst] >= 1e-6 else 0


def same_bits(folder: Path, number: int) -> bool:
    whole, resumed = (
        torch.load(exact(folder, number, which), weights_only=True)["weights"]
        for which in ("whole", "resumed")
    )
    return all(torch.equal(whole[name], resumed[name]) for name in whole)


if __name__ == "__main__":
    sys.exit(main())
