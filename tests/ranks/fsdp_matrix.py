"""Any to any with FSDP2 on one side: as checkpoint_matrix.py, which has the other backends.

    PYTHONPATH=tests python tests/ranks/fsdp_matrix.py

FSDP2 at 1, 2, 3 and 4 ranks, and at 4 with two copies of every row, writes; itself, plain, ddp and
ZeRO 0 to 3 at 1 and 3 ranks read, and the other way round.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import checkpoint_matrix as matrix
import checkpoint_worker
import forks
import task
import torch

OWN = [(1, "fsdp2"), (2, "fsdp2"), (3, "fsdp2"), (4, "fsdp2"), (4, "copies")]
OTHERS = [(1, "ddp"), (3, "ddp"), (1, 0), (3, 0), (3, 1), (1, 2), (3, 2), (1, 3), (3, 3)]
SIDES = [*OWN, *OTHERS]
PAIRS = [
    *((OWN[i], OWN[(i + n) % 5]) for i in range(5) for n in (1, 2)),
    *((OWN[i % 5], b) for i, b in enumerate(OTHERS)),
    *((b, OWN[(i + 2) % 5]) for i, b in enumerate(OTHERS)),
]
# (ranks, backend, settings) that must go on bit for bit.
EXACT = [
    *((r, "fsdp2", {"optimizer": "look_layer_sam", "base": b})
      for r in (2, 3) for b in ("lamb", "adamw")),
    *((2, "fsdp2", {"optimizer": "look_sam", "precision": p}) for p in ("bf16", "fp16")),
    (2, "fsdp2", {"optimizer": "msam"}),
    (4, "copies", {"optimizer": "look_sam"}),
]  # fmt: skip


def place(backend: object) -> dict:
    return {"backend": "fsdp2", "copies": 2} if backend == "copies" else {"backend": backend}


def writing(folder: Path, ranks: int):
    job = {"start": 0, "read": None, "write_at": matrix.WRITTEN}
    for side in SIDES:
        if side[0] == ranks:
            to = {"write": matrix.written(folder, side).parent, "steps": matrix.WRITTEN}
            yield {**job, **matrix.SGD, **to, "result": None, **place(side[1])}
    for number, (r, backend, case) in enumerate(EXACT):
        if r == ranks:
            to = {"write": folder / f"exact-{number}", "steps": matrix.STEPS}
            to["result"] = matrix.exact(folder, number, "whole")
            yield {**job, **case, **to, **place(backend)}


def reading(folder: Path, ranks: int):
    job = {"start": matrix.WRITTEN, "steps": matrix.STEPS, "write": None}
    for writer, reader in PAIRS:
        if reader[0] == ranks:
            of = {"read": matrix.written(folder, writer)}
            of["result"] = matrix.result(folder, writer, reader)
            yield {**job, **matrix.SGD, **of, **place(reader[1])}
    for number, (r, backend, case) in enumerate(EXACT):
        if r == ranks:
            of = {"read": folder / f"exact-{number}" / f"step-{matrix.WRITTEN}"}
            of["result"] = matrix.exact(folder, number, "resumed")
            yield {**job, **case, **of, **place(backend)}


def play_all(folder: Path) -> None:
    """All checkpoints, then all continuations: two starts for each number of ranks."""
    for of in (writing, reading):
        for ranks in (1, 2, 3, 4):
            forks.play(folder, ranks, checkpoint_worker.run, list(of(folder, ranks)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None, help="where all results stay")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    forks.load_deepspeed()
    folder = asked.folder or Path(tempfile.mkdtemp())
    play_all(folder)
    truth = task.truth(*matrix.SGD.values(), steps=matrix.STEPS)
    far = {
        pair: task.worst(
            torch.load(matrix.result(folder, *pair), weights_only=True)["weights"], truth
        )
        for pair in PAIRS
    }
    differ = [case for n, case in enumerate(EXACT) if not matrix.same_bits(folder, n)]
    worst = max(far, key=far.__getitem__)
    print(f"{len(PAIRS)} pairs, largest difference {far[worst]:.1e}, at {worst[0]} to {worst[1]}; "
          f"{len(EXACT)} cases held to the bit, {len(differ)} differ {differ or ''}")  # fmt: skip
    return 1 if differ or far[worst] >= 1e-6 else 0


if __name__ == "__main__":
    sys.exit(main())
