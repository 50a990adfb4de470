"""python subgroup_worker.py RANK FOLDER     one of two ranks, each alone in its process group."""

import sys
from pathlib import Path

import small
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dist_looksam import Engine


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    for ascent in ("global", "rank"):
        found = []
        for grouped in (True, False):
            model = small.net()
            given = DistributedDataParallel(model, process_group=alone) if grouped else model
            optimizer = small.optimizer(model, "look_sam", "sgd")
            if grouped:
                engine = Engine(given, optimizer, small.loss, ascent=ascent)
                losses = [float(engine.step([small.batch(10 * t + rank)]).loss) for t in range(4)]
            else:
                losses = []
                for t in range(4):

                    def closure(model=model, optimizer=optimizer, t=t):
                        optimizer.zero_grad()
                        loss = small.loss(model, small.batch(10 * t + rank))
                        loss.backward()
                        return loss

                    losses.append(float(optimizer.step(closure).detach()))
            found.append([*model.parameters(), torch.tensor(losses)])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
