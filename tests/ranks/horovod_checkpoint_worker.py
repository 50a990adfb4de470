"""A rank that has Horovod and torch.distributed at once: runs the jobs of a JSON list, in order.

horovodrun -np R python horovod_checkpoint_worker.py jobs.json
A job: {"on": a key of ON, "read": checkpoint or null, "write": folder or null, "steps": last,
"result": file or null}
"""

import json
import os
import sys
from pathlib import Path

import horovod.torch as hvd
import task
import torch
import torch.distributed as dist
from zero_worker import open_engine, optimizer_of

from dist_looksam.backends.ddp import DDP
from dist_looksam.backends.horovod import Horovod
from dist_looksam.backends.horovod_sharded import HorovodSharded
from dist_looksam.backends.plain import Plain
from dist_looksam.checkpoint import Reader, Writer
from dist_looksam.engine import Engine
from dist_looksam.leave import leave
from dist_looksam.world import World

ON = {"horovod": Horovod, "sharded": HorovodSharded, "ddp": DDP}  # others: "zero" and the stage


def engine_of(job: dict) -> Engine:
    case = {"optimizer": job["optimizer"], "base": job["base"]}
    if job["on"].startswith("zero"):
        return open_engine({**case, "stage": int(job["on"][-1])})
    kind = ON[job["on"]]
    if kind is DDP and dist.get_world_size() == 1:
        kind = Plain
    model = task.net()
    return Engine(kind(model, optimizer_of(case, model)), loss=task.loss)


def run(job: dict) -> None:
    engine = engine_of(job)
    backend = engine.backend
    assert (backend.rank, backend.size) == (hvd.rank(), hvd.size())
    if job["read"]:
        reader = Reader(Path(job["read"]))
        backend.load(reader, reader.manifest["counters"])
        assert engine.optimizer.steps == reader.step
    looks = []
    for step in range(engine.optimizer.steps, job["steps"]):
        looks.append(engine.step(task.part(step, hvd.rank(), hvd.size(), 2)).look)
    if job["write"]:
        writer = Writer(backend, Path(job["write"]))
        writer.save(job["steps"], {})
        writer.wait()
    weights = backend.full_weights()
    if job["result"] and hvd.rank() == 0:
        torch.save({"weights": weights, "looks": looks}, job["result"])


def main() -> None:
    torch.set_num_threads(1)
    hvd.init()
    world = World.from_env()
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    os.environ |= {"LOCAL_RANK": str(world.local_rank)}
    dist.init_process_group("gloo", init_method=world.url, rank=world.rank, world_size=world.size)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    dist.destroy_process_group()
    hvd.shutdown()


if __name__ == "__main__":
    main()
    leave(0)
