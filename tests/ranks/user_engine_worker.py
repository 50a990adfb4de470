"""A rank of a user's own loop: his DeepSpeedEngine saves and loads, by DeepSpeed's own calls.

python user_engine_worker.py JOBS.json FOLDER     the file: [[ranks, [job, ...]], ...]

A job: {"stage", "optimizer", "base", "read": folder or None, "universal": whether it is one,
"start": step, "steps": last, "write": folder or None, "write_at": step, "result": file or None}
"""

import json
import sys
from pathlib import Path

import forks
import task
import torch
import torch.distributed as dist
from zero_worker import open_engine

from dist_looksam import Engine

TAG = "mine"


def run(job: dict) -> None:
    case = {name: job[name] for name in ("stage", "optimizer", "base")}
    case["config"] = {"checkpoint": {"load_universal": bool(job.get("universal"))}}
    engine = open_engine(case)
    theirs = engine.backend.engine
    if job["read"]:
        path, _ = theirs.load_checkpoint(job["read"])  # the newest tag
        assert path is not None
    rank, ranks = dist.get_rank(), dist.get_world_size()
    looks, found = [], engine.backend.counters()["steps"]
    for step in range(job["start"], job["steps"]):
        looks.append(engine.step(task.part(step, rank, ranks, 2)).look)
        if job["write"] and step + 1 == job["write_at"]:
            theirs.save_checkpoint(job["write"], tag=TAG)
    weights = engine.backend.full_weights()
    kept = {"steps": engine.optimizer.steps, "looks": looks, "found": found}
    if job.get("universal"):
        kept["again"] = put_over(engine, job["read"])
    if job["result"] and rank == 0:
        torch.save({"weights": weights, **kept}, job["result"])


def put_over(engine: Engine, universal: str) -> int:
    """What the engine holds, put back over a universal checkpoint: the steps it counts then."""
    backend = engine.backend
    held = {
        (piece.name, key): tensor.clone()
        for piece, slot in zip(backend.pieces(), backend.slots(), strict=True)
        for key, tensor in slot.items()
    }
    counters = backend.counters()
    backend.engine.load_checkpoint(universal)
    backend.load(lambda name, key, start, stop: held.get((name, key)), counters)
    engine.optimizer.looks()
    return engine.optimizer.steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    forks.load_deepspeed()
    for ranks, jobs in json.loads(Path(sys.argv[1]).read_text()):
        forks.play(Path(sys.argv[2]), ranks, run, jobs)
