"""Ranks that have Horovod and torch.distributed at once: they run the jobs of a list, in order.

python horovod_checkpoint_worker.py FOLDER     FOLDER/starts.json: [[ranks, [job, ...]], ...]
A job: {"on": a key of ON, "read": checkpoint or null, "write": folder or null, "steps": last,
"result": file or null}
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import forks
import horovod.torch as hvd
import horovod_forks
import task
import torch
import torch.distributed as dist
from zero_worker import open_engine, optimizer_of

from dist_looksam.backends.ddp import DDP
from dist_looksam.backends.horovod.sharded import HorovodSharded
from dist_looksam.backends.horovod.whole import Horovod
from dist_looksam.backends.plain import Plain
from dist_looksam.checkpoint import Writer, restore
from dist_looksam.engine import Engine

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
        reader = restore(engine, job["read"])
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


def work(meet: Path, jobs: list[dict]) -> int:
    hvd.init()
    rank, ranks = hvd.rank(), hvd.size()
    os.environ |= {name: str(value) for name, value in forks.place(rank, ranks).items()}
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
    for job in jobs:
        run(job)
    dist.destroy_process_group()
    hvd.shutdown()
    return 0


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    forks.load_deepspeed()
    forks.share()
    for number, (ranks, jobs) in enumerate(json.loads((folder / "starts.json").read_text())):
        todo = partial(work, folder / f"meet-{number}", jobs)
        horovod_forks.run(ranks, todo, folder / f"log-{number}")


if __name__ == "__main__":
    main()
