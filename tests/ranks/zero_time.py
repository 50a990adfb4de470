"""What look_layer_sam's step takes against LAMB's under DeepSpeed; no test, a measurement.

    deepspeed --num_gpus 2 tests/ranks/zero_time.py [--stage 2] [--micro_batch 128] [--turns 9]

Both train in the same processes, cycles of k = 5 steps in turn, so that what else the machine does
strikes both alike. Prints the median ratio of cycles of the same turn, and its quartiles.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from dist_looksam.cli.leave import leave
from dist_looksam.data import TrainLoader, load
from dist_looksam.settings import assemble, config
from dist_looksam.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=Path(__file__).name)
    parser.add_argument("--local_rank", type=int, default=None)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--micro_batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=9)
    flags = parser.parse_args()
    world = World.from_env(local_rank=flags.local_rank)
    torch.set_num_threads(1)
    data = load("fashion_mnist")
    batch = flags.micro_batch * world.size
    argv = ["--zero_stage", str(flags.stage), "--batch_size", str(batch), "--optimizer", "lamb"]
    lamb = config.parse(argv).resolved(ranks=world.size, launcher="deepspeed", samples=60000)
    look = replace(lamb, optimizer="look_layer_sam", rho=0.0005)
    device = assemble.device_of(lamb, world)
    assemble.join(lamb, world, device)
    engines = [assemble.engine_of(s, data, device) for s in (lamb, look)]
    loader = TrainLoader(
        data.train,
        seed=0,
        batch_size=batch,
        micro_batch=flags.micro_batch,
        rank=world.rank,
        ranks=world.size,
    )
    batches = [loader.step(t) for t in range(5)]
    ratios = []
    for turn in range(flags.turns + 1):  # the first makes connections and state
        seconds = []
        for engine in engines:
            dist.barrier()
            start = time.perf_counter()
            for step in batches:
                engine.step(step)
            dist.barrier()
            seconds.append(time.perf_counter() - start)
        if turn:
            ratios.append(seconds[1] / seconds[0])
    if world.rank == 0:
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"look_layer_sam k=5 / lamb, ZeRO-{flags.stage}, {world.size} ranks, "
            f"micro-batch {flags.micro_batch}: {middle:.3f} ({low:.3f} to {high:.3f})"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
