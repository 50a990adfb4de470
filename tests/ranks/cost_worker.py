"""A rank of the cost tests: what every backend and stage sends and holds.

python cost_worker.py RANKS FOLDER     the cases: FOLDER/cases.json
"""

import cases
import forks
import task
import torch.distributed as dist
from zero_worker import open_engine, optimizer_of

from dist_looksam.backends.ddp import DDP
from dist_looksam.engine import Engine
from dist_looksam.measure.traffic import Traffic, counted


def engine_of(case: dict) -> Engine:
    if case["stage"] != "ddp":
        return open_engine(case)
    model = task.net()
    backend = DDP(model, optimizer_of(case, model))
    return Engine(backend, loss=task.loss, ascent=case.get("ascent", "global"))


def steps_of(case: dict) -> tuple[dict[str, Traffic], Engine]:
    """The traffic of the last look and of the last other step, of five."""
    engine, found = engine_of(case), {}
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(5):
        batches = task.part(step, rank, ranks, case.get("accumulation", 2))
        with counted() as traffic:
            done = engine.step(batches)
        found["look" if done.look else "other"] = traffic
    return found, engine


def run(case: dict) -> dict:
    if case.get("memory_only"):
        engine = engine_of(case)
        accumulation = task.BATCH // (dist.get_world_size() * 2)
        engine.step(task.part(0, dist.get_rank(), dist.get_world_size(), accumulation))
        return {"memory": engine.backend.memory()}
    base, _ = steps_of({**case, "optimizer": case["base_name"], "ascent": "global"})
    own, engine = steps_of(case)
    bulk = 3 * len(list(engine.module.parameters()))  # smaller calls carry a few numbers per layer
    rows = {"base": base["other"], "look": own["look"], "reuse": own.get("other")}
    sent = {
        name: {"total": traffic.total(), "bulk": traffic.elements(above=bulk)}
        for name, traffic in rows.items()
        if traffic is not None
    }
    return {"sent": sent, "memory": engine.backend.memory()}


if __name__ == "__main__":
    forks.load_deepspeed()
    cases.play(cases.of_all_ranks(run))
