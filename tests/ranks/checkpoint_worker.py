"""A rank that writes and reads checkpoints on any backend: runs the jobs of a JSON list.

torchrun --nproc_per_node R checkpoint_worker.py jobs.json
A job: {"backend": "plain" | "ddp" | 0..3 (a ZeRO stage), "optimizer", "base", "start": step,
"read": folder or null, "steps": last, "write": folder or null, "result": file or null}
"""

import json
import sys
from pathlib import Path

import task
import torch
import torch.distributed as dist
from zero_worker import open_engine, optimizer_of

from dist_looksam.checkpoint import Reader, Writer, load_buffers
from dist_looksam.engine import Engine


def engine_of(job: dict) -> Engine:
    case = {"optimizer": job["optimizer"], "base": job.get("base"), "stage": job["backend"]}
    if job["backend"] not in ("plain", "ddp"):
        return open_engine(case)
    model = task.net()
    return Engine(model, optimizer_of(case, model), task.loss)


def run(job: dict) -> None:
    engine = engine_of(job)
    backend = engine.backend
    rank, ranks = backend.rank, backend.size
    if job["read"]:
        reader = Reader(Path(job["read"]))
        backend.load(reader, reader.manifest["counters"])
        load_buffers(backend.module, reader.buffers(rank, ranks), reader.path)
        assert reader.step == engine.optimizer.steps == job["start"]
    looks = []
    for step in range(job["start"], job["steps"]):
        looks.append(engine.step(task.part(step, rank, ranks, 2)).look)
    if job["write"]:
        writer = Writer(backend, Path(job["write"]))
        writer.save(job["steps"], {})
        writer.wait()
    weights = backend.full_weights()
    if job["result"] and rank == 0:
        torch.save({"weights": weights, "looks": looks}, job["result"])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
