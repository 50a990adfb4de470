"""A rank that trains, writes and reads checkpoints on any backend, as a job says.

A job: {"backend": "ddp" (one rank: plain), "fsdp2" or 0..3 (a ZeRO stage), "copies": of FSDP2's
rows, if not 1, "optimizer", "base", "precision", "start": step, "read": checkpoint or None,
"steps": last, "write": folder or None, "write_at": step, "result": file or None}
"""

from pathlib import Path

import fsdp_worker
import task
import torch
from zero_worker import open_engine, optimizer_of

from dist_looksam.checkpoint import Writer, restore
from dist_looksam.engine import Engine


def engine_of(job: dict) -> Engine:
    case = {"optimizer": job["optimizer"], "base": job.get("base"), "stage": job["backend"]}
    case["precision"] = job.get("precision", "fp32")
    if job["backend"] == "fsdp2":
        names = ("optimizer", "base", "copies", *(["precision"] if job.get("precision") else []))
        return fsdp_worker.engine_of({name: job[name] for name in names if name in job})
    if job["backend"] != "ddp":
        return open_engine(case)
    model = task.net()
    return Engine(model, optimizer_of(case, model), task.loss, precision=case["precision"])


def read(job: dict, engine: Engine) -> None:
    """Go on from a checkpoint; what is held then is what was written, bit for bit."""
    backend, reader = engine.backend, restore(engine, job["read"])
    assert reader.step == engine.optimizer.steps == job["start"]
    for piece, slots in zip(backend.pieces(), backend.slots(), strict=True):
        assert set(reader.keys) <= set(slots), (piece.name, sorted(slots))
        for key in ("weight", *reader.keys):
            held = reader(piece.name, key, piece.start, piece.stop)
            assert torch.equal(slots[key].cpu(), held), (piece.name, key)


def run(job: dict) -> None:
    engine = engine_of(job)
    backend = engine.backend
    rank, ranks = backend.rank, backend.size
    if job["read"]:
        read(job, engine)
    looks, skipped = [], []
    for step in range(job["start"], job["steps"]):
        done = engine.step(task.part(step, rank, ranks, 2))
        looks.append(done.look)
        skipped.append(not bool(done.seen.finite))
        if job["write"] and step + 1 == job["write_at"]:
            writer = Writer(backend, Path(job["write"]))
            writer.save(step + 1, {})
            writer.wait()
    weights = backend.full_weights()
    if job["result"] and rank == 0:
        torch.save({"weights": weights, "looks": looks, "skipped": skipped}, job["result"])
