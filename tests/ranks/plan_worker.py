"""A rank of the plan's tests: what a run really holds and sends.

python plan_worker.py RANKS FOLDER     the cases: FOLDER/cases.json

A case is {"argv": train.py's flags, "shape": [C, H, W], "classes": n}; the images are noise.
"""

import ctypes
import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import forks
import torch
import torch.distributed as dist
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from dist_looksam.data import Batch
from dist_looksam.engine import Engine
from dist_looksam.measure.traffic import counted
from dist_looksam.settings import assemble, config


def settings_of(case: dict, ranks: int) -> config.Settings:
    settings = config.parse(case["argv"])
    return settings.resolved(ranks=ranks, launcher="torchrun", samples=60000)


def data_of(case: dict) -> Any:
    """As much of a `Data` as a model is made from."""
    return SimpleNamespace(num_classes=case["classes"], shape=tuple(case["shape"]))


def batches_of(case: dict, settings: config.Settings, ranks: int) -> list[Batch]:
    n = settings.micro_batch
    accumulation = settings.batch_size // (n * ranks)
    draw = torch.Generator().manual_seed(0)
    found = []
    for number in range(accumulation):
        images = torch.randint(0, 256, (n, *case["shape"]), generator=draw, dtype=torch.uint8)
        labels = torch.randint(case["classes"], (n,), generator=draw)
        keys = torch.arange(n) + number * n
        mean = (0.5,) * case["shape"][0]
        found.append(Batch(images=images, labels=labels, keys=keys, mean=mean, std=mean))
    return found


class _Mallinfo(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )]  # fmt: skip


_mallinfo = ctypes.CDLL(None).mallinfo2
_mallinfo.restype = _Mallinfo


def allocated() -> int:
    """Bytes that this process holds by malloc, of all threads: gloo's free tensors, too, which is
    what torch's profiler does not see."""
    now = _mallinfo()
    return now.uordblks + now.hblkhd


@cache
def allocates(function: OpOverload) -> bool:
    """Whether what it returns is new memory: no view, not in place."""
    return any(r.alias_info is None for r in function._schema.returns)


class Peak(TorchDispatchMode):
    """The most that was allocated after any of torch's operations inside that allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = allocated()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if allocates(function):  # asking malloc is slow
            self.bytes = max(self.bytes, allocated())
        return out


def on_the_wire() -> int:
    """Bytes that this network namespace's loopback has sent so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise LookupError("no loopback")


def held_and_sent(engine: Engine, batches: list[Batch]) -> tuple[int, int]:
    """Of one step: the most that is allocated, and bytes on the wire, all ranks together."""
    gc.collect()  # when Python collects DeepSpeed's cycles is chance
    dist.barrier()
    before = on_the_wire()
    dist.barrier()
    with Peak() as peak:
        engine.step(batches)
    dist.barrier()
    after = on_the_wire()
    dist.barrier()
    return peak.bytes, after - before


def run(case: dict) -> dict:
    ranks = dist.get_world_size()
    settings = settings_of(case, ranks)
    batches = batches_of(case, settings, ranks)
    for _ in range(3):  # what earlier cases have left, down to the last cycle
        gc.collect()
    start = allocated()
    engine = assemble.engine_of(settings, data_of(case), torch.device("cpu"))
    engine.step(batches)  # makes state and connections
    held, sent, wire = [], {}, {}
    for _ in range(settings.k):
        name = "look" if engine.optimizer.looks() else "reuse"
        peak, wire[name] = held_and_sent(engine, batches)
        held.append(peak - start)
    for _ in range(settings.k):
        name = "look" if engine.optimizer.looks() else "reuse"
        with counted() as traffic:
            engine.step(batches)
        calls = traffic.calls.items()
        sent[name] = sorted([kind, size, times] for (kind, size), times in calls)
    return {"peak": max(held), "memory": engine.backend.memory(), "sent": sent, "wire": wire}


def in_turn(result_of: Callable[[dict], dict]) -> Callable[[dict], dict]:
    """The same. What is left of a case stays: else the next would see memory come back."""

    def measured(case: dict) -> dict:
        found = result_of(case)
        gc.collect()
        gc.freeze()
        return found

    return measured


if __name__ == "__main__":
    forks.load_deepspeed()
    cases.play(cases.of_all_ranks(in_turn(run)))
