"""Ranks that average their weights: the average, what it costs, and how it goes on.

python ema_worker.py RANKS FOLDER     the cases: FOLDER/cases.json, {"on": backend or ZeRO stage}
"""

import cases
import ddp_worker
import forks
import fsdp_worker
import task
import torch
import torch.distributed as dist
import zero_worker
from state_worker import folder_of

from dist_looksam import Engine, checkpoint, restore
from dist_looksam.measure.traffic import counted

DECAY, DONE = 0.7, 8


def engine_of(case: dict) -> Engine:
    if isinstance(case["on"], int):
        made = zero_worker.open_engine({**case, "stage": case["on"]})
    else:
        made = {"fsdp2": fsdp_worker, "ddp": ddp_worker}[case["on"]].engine_of(case)
    return Engine(made.backend, loss=task.loss, ema=DECAY)


def steps(engine: Engine, begin: int, end: int) -> Engine:
    for t in range(begin, end):
        engine.step(task.part(t, dist.get_rank(), dist.get_world_size(), 2))
    return engine


def seen(engine: Engine) -> torch.Tensor:
    """What forward computes with the weights of the moment."""
    return engine.backend.evaluate(lambda m: m(task.batch(99)[0].to(next(m.parameters()).dtype)))


def taken(engine: Engine) -> dict:
    """The averages and the weights, as a user takes them, and what forward says of them."""
    before = seen(engine)
    with engine.averaged():
        ema, inside = engine.backend.full_weights(), seen(engine)
    same = torch.equal(before, seen(engine))
    weights = engine.backend.full_weights()
    return {"ema": ema, "weights": weights, "inside": inside.float(), "same": same}


def result_of(case: dict) -> dict:
    first = steps(engine_of(case), 0, DONE)
    path = checkpoint.save(first, folder_of(case))
    taken(first)  # between two looks, which must not notice
    end = taken(steps(first, DONE, task.STEPS))
    second = engine_of(case)
    restore(second, path)
    resumed = taken(steps(second, DONE, task.STEPS))
    bytes_of = first.backend.gather(first.backend.memory()["ema"])
    with counted() as traffic:
        first.backend.average_weights(task.STEPS + 1)
    return {"end": end, "resumed": resumed, "sent": traffic.total(), "bytes": bytes_of}


if __name__ == "__main__":
    forks.load_deepspeed()
    cases.play(result_of)
