"""A rank of the overflow tests: one gradient of one pass on one rank is made infinite.

python zero_overflow_worker.py RANKS FOLDER     the cases: FOLDER/cases.json
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import cases
import forks
import task
import torch
import torch.distributed as dist
from reads import Reads, as_on_a_gpu
from zero_worker import open_engine

STEP = 3  # a look at k = 3; the step before and after are not


def snapshot(engine) -> dict:
    """Bits of the master weights, of all state, and of the weights that forward sees."""
    zero = engine.backend
    state = engine.optimizer.state
    found = {}
    for i, flat in enumerate(zero.layout.flats):
        found[f"master {i}"] = flat.master.detach().clone()
        for key, value in state.get(flat.master, {}).items():
            found[f"{key} {i}"] = torch.as_tensor(value).clone()
    for name, p in zero.module.named_parameters():
        found[f"visible {name}"] = task.own_part(p).clone()
    return found


def bits(tensor: torch.Tensor) -> bytes:
    """Padding may be NaN, which equals nothing, itself included."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def changed(before: dict, after: dict) -> list[str]:
    names = sorted(before.keys() | after.keys())
    return [
        n for n in names if n not in before or n not in after or bits(before[n]) != bits(after[n])
    ]


@contextmanager
def waits() -> Iterator[list]:
    """Gets an entry whenever DeepSpeed waits for all work of the device."""
    from deepspeed.accelerator import get_accelerator

    accelerator, calls = get_accelerator(), []
    accelerator.synchronize = lambda *_: calls.append(1)
    try:
        yield calls
    finally:
        del accelerator.synchronize


def run(case: dict) -> dict:
    engine = open_engine(case)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    calls = {"now": 0, "bad": None}

    def loss(model, samples):
        calls["now"] += 1
        value = task.loss(model, samples)
        # Once, at the second micro-batch of the chosen pass, or at the chosen call, on the last
        # rank alone.
        return value * math.inf if calls["now"] == calls["bad"] and rank == ranks - 1 else value

    engine.loss = loss
    out: dict = {"looks": [], "losses": [], "reads": [], "waits": [], "applied": []}
    for step in range(8):
        calls["now"] = 0
        bad = case.get("bad_call") or 2 * case["bad_pass"]
        calls["bad"] = bad if step == case.get("bad_step", STEP) else None
        before, scale = snapshot(engine), engine.backend.layout.scale()
        batches = task.part(step, rank, ranks, 2)
        with as_on_a_gpu() if case.get("gpu") else nullcontext(), Reads() as reads, waits() as n:
            done = engine.step(batches)
        out["reads"].append((reads.count - reads.later, reads.later))
        out["waits"].append(len(n))
        out["applied"].append(bool(engine.backend.engine.was_step_applied()))
        out["looks"].append(done.look)
        out["losses"].append(float(done.loss))
        moved = changed(before, snapshot(engine))
        if calls["bad"]:
            out["changed"], out["finite"] = moved, bool(done.seen.finite)
            out["scales"] = (scale, engine.backend.layout.scale())
        else:
            out.setdefault("moved", []).append(bool(moved))
    return {**out, "skipped": engine.backend.engine.skipped_steps}


if __name__ == "__main__":
    forks.load_deepspeed()
    cases.play(cases.of_all_ranks(run))
