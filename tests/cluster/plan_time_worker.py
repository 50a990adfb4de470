"""A rank of the plan's timing test: calibrates, then takes steps on each backend.

RANK=.. WORLD_SIZE=.. plan_time_worker.py FOLDER FLAGS: everything is done once for each cable, when
the file FOLDER/NAME says that it is in place; rank 0 writes FOLDER/NAME.json.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from dist_looksam.cli.leave import leave
from dist_looksam.data import TrainLoader, load
from dist_looksam.engine import Engine
from dist_looksam.plan import calibrate
from dist_looksam.settings import assemble, config
from dist_looksam.world import World

CABLES = {"fast": 8, "slow": 3}  # cycles that are timed, after one that is not
STAGES = {"ddp": None, "zero": 2}


def cycle_seconds(engine: Engine, steps: list, cycles: int) -> list[float]:
    """Seconds a step, of each cycle of a look and what follows it."""
    found = []
    for _ in range(cycles + 1):
        dist.barrier()
        began = time.perf_counter()
        for batches in steps:
            engine.step(batches)
        dist.barrier()
        found.append((time.perf_counter() - began) / len(steps))
    return found[1:]


def main() -> None:
    folder, argv = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    world, device = World.from_env(), torch.device("cpu")
    settings = config.parse(argv)
    ddp = settings.resolved(ranks=world.size, launcher="torchrun", samples=60000)
    zero = replace(ddp, backend="zero", zero_stage=2)
    data = load(settings.data, augment="none")
    assemble.join(ddp, world, device)
    loader = TrainLoader(
        data.train, seed=0, batch_size=ddp.batch_size, micro_batch=ddp.micro_batch,
        rank=world.rank, ranks=world.size,
    )  # fmt: skip
    steps = [loader.step(t) for t in range(ddp.k)]
    engines = {n: assemble.engine_of(s, data, device) for n, s in (("ddp", ddp), ("zero", zero))}
    for name, cycles in CABLES.items():
        while not (folder / name).exists():
            time.sleep(0.1)
        found: dict = {}
        if name == "fast":
            found["network"] = asdict(calibrate.measure_network(device))
        # Before, between and after, since the machine's speed may drift.
        speeds = [calibrate.measure_device(ddp, data.shape, data.num_classes, device)]
        times = {}
        for n, engine in engines.items():
            times[n] = cycle_seconds(engine, steps, cycles)
            speeds.append(calibrate.measure_device(ddp, data.shape, data.num_classes, device))
        speeds.sort(key=lambda s: s.flops["fp32"])
        found |= {"device": asdict(speeds[1]), "gflops": [s.flops["fp32"] / 1e9 for s in speeds]}
        found |= {"times": times, "medians": {n: statistics.median(t) for n, t in times.items()}}
        if world.rank == 0:
            (folder / f"{name}.part").write_text(json.dumps(found))
            (folder / f"{name}.part").rename(folder / f"{name}.json")
        dist.barrier()
    loader.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
