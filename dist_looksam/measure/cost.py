"""`dist-looksam cost FLAGS`: the communication of a step and the memory of a rank, measured.

Takes train.py's flags and runs under the same launchers. Trains a few steps, writes nothing, and
prints one table for the method and its base on rank 0.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..cli import table
from ..cli.arguments import Parser, check_new_file
from ..data import Data
from ..engine import Engine
from ..settings import assemble, config
from ..settings.config import Settings
from ..world import World
from .traffic import Traffic, counted


def main(argv: Sequence[str]) -> int:
    """Measure the elements that a step communicates and the bytes that a rank holds, in a few steps
    with any flags of train.py."""
    usage = "dist-looksam cost [--json FILE] FLAGS_OF_TRAIN"
    parser = Parser("dist-looksam cost", usage, description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="file that also gets the numbers")
    own, flags = parser.parse_known_args(argv)
    settings = config.parse(flags)
    if own.json is not None:  # before the measurement
        check_new_file("json", own.json)
    world = World.from_env(local_rank=settings.local_rank)
    settings, device, data, _ = assemble.start(settings, world)
    rows = measure(settings, data, device)
    if world.rank == 0:
        _print(settings, world.size, rows)
        if own.json is not None:
            own.json.write_text(json.dumps(rows))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def measure(settings: Settings, data: Data, device: Any) -> dict[str, Any]:
    """{"base", "look", "reuse"}: elements by collective; "memory": bytes of this rank."""
    settings = replace(settings, looks="periodic", look_from=0, look_until=None)
    assert settings.base is not None
    base = replace(settings, optimizer=settings.base)
    plain, _ = _steps(base, data, device)
    rows: dict[str, Any] = {"base": _row(plain[4])}
    steps, engine = _steps(replace(settings, k=2), data, device)
    looks = [traffic for traffic in steps if traffic[0]]
    others = [traffic for traffic in steps if not traffic[0]]
    rows["look"] = _row(looks[-1]) if looks else None
    rows["reuse"] = _row(others[-1]) if others else None
    rows["memory"] = engine.backend.memory()
    rows["layers"] = len(list(engine.module.parameters()))
    return rows


def _steps(
    settings: Settings, data: Data, device: Any
) -> tuple[list[tuple[bool, Traffic]], Engine]:
    engine = assemble.engine_of(settings, data, device)
    loader = assemble.train_loader(settings, data, engine.backend)
    steps = []
    for step in range(6):  # the first ones make connections and traces
        batches = loader.step(step)
        with counted() as traffic:
            done = engine.step(batches)
        steps.append((done.look, traffic))
    loader.close()
    return steps, engine


def _row(step: tuple[bool, Traffic]) -> dict[str, Any]:
    calls = step[1].calls
    listed = sorted((kind, size, times) for (kind, size), times in calls.items())
    return {"elements": step[1].elements(), "calls": [list(c) for c in listed]}


def _print(settings: Settings, ranks: int, rows: dict[str, Any]) -> None:
    stage = "" if settings.zero_stage is None else f" stage {settings.zero_stage}"
    print(f"{settings.optimizer} on {settings.base}, {settings.backend}{stage}, {ranks} ranks")
    print("elements that rank 0 puts into collectives, per optimizer step:")
    steps = {name: rows[name]["elements"] for name in ("base", "look", "reuse") if rows[name]}
    kinds = sorted({kind for elements in steps.values() for kind in elements})
    sent = [[n, *(f"{row.get(kind, 0):,}" for kind in kinds)] for n, row in steps.items()]
    print(table.text(["step", *kinds], sent, indent="  "))
    print("bytes that rank 0 holds:")
    memory = [[name, f"{size:,}"] for name, size in rows["memory"].items()]
    print(table.text(["", ""], memory, indent="  "))
