"""A rank of the plan's tests on a GPU: what a run allocates, how long its steps take, and how fast
the GPU is by `dist-looksam plan --calibrate`.

python -m torch.distributed.run --nproc_per_node 1 cuda_plan_worker.py 1 FOLDER
"""

import statistics
import time
from dataclasses import asdict

import cases
import torch
import torch.distributed as dist
from plan_worker import batches_of, data_of, in_turn, settings_of

from dist_looksam.engine import Engine
from dist_looksam.plan.calibrate import measure_device
from dist_looksam.settings import assemble

CYCLES = 3
DEVICE = torch.device("cuda", 0)


def cycle(engine: Engine, batches: list, k: int) -> float:
    """Seconds a step, over a look and the steps to the next."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(k):
        engine.step(batches)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / k


def run(case: dict) -> dict:
    settings = settings_of(case, dist.get_world_size())
    if case.get("calibrate"):
        shape, classes = tuple(case["shape"]), case["classes"]
        return asdict(measure_device(settings, shape, classes, DEVICE))
    batches = [b.pin() for b in batches_of(case, settings, dist.get_world_size())]
    start = torch.cuda.memory_allocated()
    engine = assemble.engine_of(settings, data_of(case), DEVICE)
    engine.step(batches)  # makes state and connections, and is a look
    for _ in range(settings.k - 1):
        engine.step(batches)
    torch.cuda.reset_peak_memory_stats()
    times = [cycle(engine, batches, settings.k) for _ in range(CYCLES)]
    peak = torch.cuda.max_memory_allocated() - start
    return {"peak": peak, "memory": engine.backend.memory(), "seconds": statistics.median(times)}


if __name__ == "__main__":
    cases.play(in_turn(run))
