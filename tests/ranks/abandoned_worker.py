"""A rank of the tests of broken-off steps: runs every case of a JSON list, writes what came out.

python abandoned_worker.py RANKS FOLDER     the cases: FOLDER/cases.json
"""

from datetime import timedelta

import abandoned
import cases
import ddp_worker
import forks
import fsdp_worker
import task
import torch.distributed as dist
import zero_worker
from torch.nn.parallel import DistributedDataParallel

from dist_looksam import Engine


def engine_of(case: dict, loss: abandoned.Breaking) -> Engine:
    backend = case["backend"]
    if backend == "ddp":
        return ddp_worker.engine_of(case, loss)
    if backend == "wrapped":  # by the caller, with buckets that leave during backward
        model = task.net()
        optimizer = zero_worker.optimizer_of(case, model)
        return Engine(DistributedDataParallel(model, bucket_cap_mb=1e-4), optimizer, loss)
    if backend == "fsdp2":
        return fsdp_worker.engine_of(case, loss)
    engine = zero_worker.open_engine({"stage": backend, **case})
    engine.loss = loss
    return engine


def run(case: dict) -> dict:
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def part(step: int) -> list:
        return task.part(step, rank, ranks, case.get("accumulation", 2))

    return abandoned.compare(case, lambda loss: engine_of(case, loss), part)


if __name__ == "__main__":
    forks.load_deepspeed()
    cases.play(cases.of_all_ranks(run), timeout=timedelta(seconds=60))
