"""How long training stands still for a checkpoint, against writing it before going on.

    torchrun --nproc_per_node 2 tests/ranks/checkpoint_time.py [--parameters 100e6] [--folder DIR]

A model of so many parameters with LAMB's state and g_v: 16 bytes a parameter. A save is measured
five times each way, in turn; the first background save, which makes its memory, is shown apart.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dist_looksam import Engine
from dist_looksam.checkpoint import Writer
from dist_looksam.cli.leave import leave
from dist_looksam.optim import table

WIDTH = 1000


def engine_of(parameters: float) -> Engine:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(round(parameters / 1e6))))
    base = table.build_base("lamb", table.groups(model, 0.05), lr=1e-3)
    optimizer = table.build(base, rule=table.rule_of("look_layer_sam"), rho=1e-3, alpha=0.7)
    for p in model.parameters():  # as after a look; a step of 100 M on a CPU says nothing more
        state = {key: torch.rand_like(p) for key in ("g_v", "exp_avg", "exp_avg_sq")}
        optimizer.state[p].update(state, step=torch.tensor(1.0))
    return Engine(model, optimizer, lambda model, x: model(x).mean())


def stood_still(writer: Writer, step: int) -> float:
    """Seconds that `save` takes, the slowest rank's."""
    dist.barrier()
    began = time.perf_counter()
    writer.save(step, {})
    taken = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--folder", default=None)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    engine = engine_of(asked.parameters)
    made = [tempfile.mkdtemp(dir=asked.folder)]
    dist.broadcast_object_list(made)
    folder = Path(made[0])
    ways = {
        background: Writer(engine.backend, folder / str(background), keep=1, background=background)
        for background in (True, False)
    }
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for step in range(6):
        for background, writer in ways.items():
            seconds[background].append(stood_still(writer, step))
            writer.wait()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
        now, before = (statistics.median(seconds[b][1:]) for b in (True, False))
        print(f"stands still {now:.3f} s (first {seconds[True][0]:.3f}), "
              f"synchronous {before:.3f} s: {now / before:.1%}")  # fmt: skip
        print({b: [round(s, 3) for s in v] for b, v in seconds.items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
