"""Measures the lists of groups of `speed.PROCESSES` whose numbers are its arguments.

A group of rows has the same model, micro-batch and compile mode. Its engines train in turn, a cycle
of k steps each, so that a ratio is between neighbours in time. The first cycle of each, with
compilation, is counted apart.
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lines
import torch
import trained
from lines import ON_GPU
from speed import BARE, PROCESSES
from trained import K

from dist_looksam.optim import table
from dist_looksam.plan.machines import dense_peak

TURNS = 4 if ON_GPU else 1
BASES = {"lamb": "adamw", "look_sam": "adamw", "look_layer_sam": "lamb"}


@dataclass
class Row:
    """One engine or loop of a group, and its times: seconds a step of each turn."""

    backend: str
    optimizer: str
    step: Callable[[], Any]
    first: float  # seconds of the first cycle, with compilation
    held: int  # bytes that it holds between steps
    times: list[float]
    hosts: list[float]
    peak: int = 0


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def allocated() -> int:
    return torch.cuda.memory_allocated() if ON_GPU else 0


def opened(backend: str, optimizer: str, mode: str, model: str, images: int, batch: Any) -> Row:
    before = allocated()
    if backend == BARE:
        step = trained.bare_loop(model, images, mode, batch)
    else:
        trained.join(backend)
        engine = trained.engine_of(backend, optimizer, model, images, mode)

        def step() -> Any:
            return engine.step([batch])

    began = time.perf_counter()
    for _ in range(K):
        step()
    synchronise()
    first = time.perf_counter() - began
    return Row(backend, optimizer, step, first, allocated() - before, [], [])


def turn(row: Row) -> None:
    """A cycle: its time, the host's part of it, and what it allocates."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    others = allocated() - row.held
    began = time.perf_counter()
    for _ in range(K):
        row.step()
    asked = time.perf_counter()
    synchronise()
    row.times.append((time.perf_counter() - began) / K)
    row.hosts.append((asked - began) / K)
    if ON_GPU:
        row.peak = max(row.peak, torch.cuda.max_memory_allocated() - others)


def group(mode: str, model: str, images: int, wanted: list[tuple[str, str]]) -> None:
    """Measure the rows of a group, and write them."""
    images = images if ON_GPU else 4
    batch, rows = trained.batch_of(images), []
    named = {"model": model, "micro_batch": images, "compile": mode}
    for backend, optimizer in wanted:
        if lines.left() < 10:
            break
        try:
            rows.append(opened(backend, optimizer, mode, model, images, batch))
        except Exception as error:  # the other rows go on
            why = {"backend": backend, "optimizer": optimizer, "error": lines.reason(error)}
            lines.write("speed", **named, **why)
    for number in range(TURNS):
        for i in range(len(rows)):
            turn(rows[(i + number) % len(rows)])  # so that none always follows the same one
        if lines.left() < 8 and number:
            break
    for row in rows:
        lines.write("speed", **named, **result(row, rows, model, images))


def result(row: Row, rows: list[Row], model: str, images: int) -> dict[str, Any]:
    seconds = statistics.median(row.times)
    looks = row.backend != BARE and table.method(row.optimizer).ascent is not None
    passes = 1 + 1 / K if looks else 1.0
    peak = dense_peak(lines.where()["card"], "bf16")
    flops = 3 * passes * images * trained.flops_of(model)
    found: dict[str, Any] = {
        "backend": row.backend,
        "optimizer": row.optimizer,
        "k": K,
        "turns": len(row.times),
        "ms": round(1e3 * seconds, 3),
        "ms_least": round(1e3 * min(row.times), 3),
        "ms_most": round(1e3 * max(row.times), 3),
        "host_ms": round(1e3 * statistics.median(row.hosts), 3),
        "images_per_s": round(images / seconds, 1),
        "mfu": round(flops / seconds / peak, 4) if peak else None,
        "peak_gib": round(row.peak / 2**30, 2) if ON_GPU else None,
        "first_cycle_s": round(row.first, 2),
    }
    for name, backend, optimizer in (
        ("to_base", row.backend, BASES.get(row.optimizer)),
        ("to_plain", "plain", row.optimizer if row.backend not in ("plain", BARE) else None),
        ("to_bare", BARE, row.optimizer if row.backend == "plain" else None),
    ):
        other = [r for r in rows if (r.backend, r.optimizer) == (backend, optimizer)]
        if other:
            ratios = [a / b for a, b in zip(row.times, other[0].times, strict=True)]
            spread = (statistics.median(ratios), min(ratios), max(ratios))
            found[name] = [round(ratio, 4) for ratio in spread]
    return found


def work(number: int) -> None:
    """One list of PROCESSES, without a GPU its first group."""
    for of_group in PROCESSES[number] if ON_GPU else PROCESSES[number][:1]:
        if lines.left() < 12:
            lines.write("speed", skipped=[of_group[:3]], why="no time was left")
            continue
        torch._dynamo.reset()  # else a second size makes a graph for any size
        try:
            group(*of_group)
        except Exception as error:
            lines.write("speed", group=of_group[:3], error=lines.reason(error))
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        work(number)
    sys.stdout.flush()
    os._exit(0)  # a process group or a compiler's workers need no clearing up
