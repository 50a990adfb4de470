"""A rank of the DDP tests: runs every case of a JSON list, writes what came out.

python ddp_worker.py RANKS FOLDER     the cases: FOLDER/cases.json
"""

import random
from dataclasses import replace

import cases
import numpy as np
import task
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dist_looksam import Engine
from dist_looksam.measure.traffic import counted
from dist_looksam.optim import table


def engine_of(case: dict, loss=task.loss) -> Engine:
    """As a user makes it: with `wrapped`, the module is in DistributedDataParallel already, and
    may be compiled, which was put in a second one: results were random, "rank" was "global"."""
    name, model = case["optimizer"], task.net()
    groups = table.groups(model, task.SETTINGS["decay"], case.get("perturb", "all"))
    for group in groups:
        if group["weight_decay"] == 0:
            group["lr"] = task.SMALLER_LR
    base = table.base_of(name, case.get("base"))
    inner = table.build_base(base, groups, lr=task.LR, eps=task.SETTINGS["eps"])
    rule = table.rule_of(name, k=task.SETTINGS["k"], **case.get("rule", {}))
    rho = task.RHO[rule.ascent or "model"]
    optimizer = table.build(inner, rule=rule, rho=rho, alpha=task.SETTINGS["alpha"])
    how = {x: case[x] for x in ("clip", "ascent", "m", "precision") if x in case}
    module: torch.nn.Module = DistributedDataParallel(model) if case.get("wrapped") else model
    if case.get("wrapped") == "compiled":
        module = torch.compile(module, backend="eager")
    return Engine(module, optimizer, loss, **how)


class Spoilt:
    """task.loss, infinite on the last rank in one pass; counts passes by calls."""

    def __init__(self, number: int) -> None:
        self.here = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        self.number, self.calls = number, 0

    def __call__(self, model, samples):
        self.calls += 1
        value = task.loss(model, samples)
        return value * float("inf") if self.here and self.calls == self.number else value


def own_part(case: dict, step: int) -> list:
    accumulation = case.get("accumulation", 2)
    return task.part(step, dist.get_rank(), dist.get_world_size(), accumulation)


def compare(case: dict) -> dict:
    """Train; weights and what each step reported."""
    engine = engine_of(case)
    rows = []
    for step in range(task.STEPS):
        done = engine.step(own_part(case, step))
        numbers = (done.loss, done.seen.grad_norm, done.seen.update_norm)
        rows.append([done.look, *map(float, numbers)])
    return {"weights": engine.backend.full_weights(), "rows": rows, "same": same(engine)}


def same(engine: Engine) -> bool:
    """Whether all ranks hold the same bits, of weights and of g_v."""
    held = [p.detach() for p in engine.module.parameters()]
    held += [s["g_v"] for s in engine.optimizer.state.values() if "g_v" in s]
    flat = torch.cat([x.reshape(-1) for x in held])
    first = flat.clone()
    dist.broadcast(first, 0)
    differ = flat.new_tensor(float(not torch.equal(flat, first)))
    dist.all_reduce(differ)
    return float(differ) == 0


def count(case: dict) -> dict:
    """Per step: whether it looked, and the elements of every all-reduce the profiler saw."""
    engine, k = engine_of(case), task.SETTINGS["k"]
    for step in range(k):  # DDP agrees on its buckets in the first passes
        engine.step(own_part(case, step))
    rows = []
    for step in range(k, 2 * k):
        with counted() as traffic:
            look = engine.step(own_part(case, step)).look
        assert {kind for kind, _ in traffic.calls} == {"all_reduce"}
        rows.append([look, *(size for _, size in traffic.calls.elements())])
    return {"rows": rows, "numel": sum(p.numel() for p in engine.module.parameters())}


def overflow(case: dict) -> dict:
    """Step 0 looks; in step 3, also a look, the last rank overflows in the given pass."""
    # To sort the buckets; of steps 0, 1, 2, each of one micro-batch.
    passes = 1 + (1 if case["optimizer"] == "msam" else 2) + 1 + 1
    loss = Spoilt(passes + case["overflow"])
    engine = engine_of({**case, "accumulation": 1}, loss)
    for step in range(3):
        engine.step(own_part({"accumulation": 1}, step))
    before = [p.detach().clone() for p in engine.module.parameters()]
    done = engine.step(own_part({"accumulation": 1}, 3))
    after = [p.detach() for p in engine.module.parameters()]
    kept = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    skipped = not bool(done.seen.finite)
    again = engine.step(own_part({"accumulation": 1}, 4))
    scaler = engine.backend.scaler
    own = [kept, skipped, again.look, bool(again.seen.finite), scaler.scale if scaler else None]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {"everyone": everyone, "same": same(engine)}


def draws(case: dict) -> dict:
    """What the loss draws in the first pass of the first step, and what the seeds give first."""
    seen: list = []

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand())]

    def loss(model, samples):
        seen.append(draw())
        return task.loss(model, samples)

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)

    seed()
    want = draw()
    seed()
    engine_of(case, loss).step(own_part({"accumulation": 1}, 0))
    return {"seen": seen, "want": want}


def unlike(case: dict) -> dict:
    """Adaptive looks where the last rank computes each norm with another rounding, as devices of
    another kind may: whether the ranks' decisions stayed the same, and the number of looks."""
    engine, looks = engine_of(case), 0
    record = engine.optimizer.decider.record
    if dist.get_rank() == dist.get_world_size() - 1:
        engine.optimizer.decider.record = lambda step, seen: record(
            step, replace(seen, grad_norm=seen.grad_norm * (1 + 1e-3 * (step % 3)))
        )
    for step in range(task.STEPS):
        with counted() as traffic:
            looks += engine.step(own_part(case, step)).look
        decided = engine.backend.gather(engine.optimizer.counters()["looks"])
        if any(other != decided[0] for other in decided):  # else one would wait for the other
            return {"same": False, "looks": looks}
    small = sum(times for (_, size), times in traffic.calls.items() if size < 10)
    return {"same": True, "looks": looks, "small": small}


KINDS = {"compare": compare, "count": count, "overflow": overflow, "draws": draws}
KINDS |= {"unlike": unlike}


if __name__ == "__main__":
    cases.play(lambda case: KINDS[case.get("kind", "compare")](case))
