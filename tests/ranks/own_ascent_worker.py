"""A rank of the tests of `ascent="rank"`: runs every case of a JSON list, writes what came out.

python own_ascent_worker.py RANKS FOLDER     the cases: FOLDER/cases.json
"""

from datetime import timedelta

import cases
import forks
import task
import torch
import torch.distributed as dist
import zero_worker
from torch.nn.parallel import DistributedDataParallel

from dist_looksam import ConfigError, Engine


class Branch(task.Net):
    """With a layer that rank 0's samples go through alone; one that no sample goes through."""

    def __init__(self, *, zeros: bool) -> None:
        super().__init__()
        self.branch, self.idle = torch.nn.Linear(7, 3), torch.nn.Linear(7, 3)
        self.zeros = zeros  # elsewhere it adds 0 times itself, which gives a gradient of zero

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        if dist.get_rank() == 0:
            out = out + self.branch(x)
        elif self.zeros:
            out = out + 0.0 * self.branch(x)
        return out


def trained(case: dict, *, zeros: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Branch(zeros=zeros)
    model.idle.requires_grad_(case["stage"] == "ddp")  # DeepSpeed gives such a layer gradient 0
    optimizer = zero_worker.optimizer_of(case, model)
    how = {"loss": task.loss, "ascent": "rank"}
    if case["stage"] == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        engine = Engine(wrapped, optimizer, **how)
    else:
        deepspeed = forks.load_deepspeed()
        made = zero_worker.config_of(case)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=made)
        engine = Engine(engine, **how)
    for step in range(7):
        engine.step(task.part(step, dist.get_rank(), dist.get_world_size(), 1))
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def unused(case: dict) -> dict:
    """Weights where a rank has no gradient of a layer, and where it has one of zero."""
    return {"got": trained(case, zeros=False), "want": trained(case, zeros=True)}


def refused(case: dict) -> str:
    try:
        ascent = "global" if "m" in case else "rank"
        engine = zero_worker.open_engine({**case, "ascent": ascent})
        engine.step(task.part(0, dist.get_rank(), dist.get_world_size(), 1))
    except ConfigError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    forks.load_deepspeed()
    play = {"unused": unused, "refused": refused}
    cases.play(
        cases.of_all_ranks(lambda case: play[case["kind"]](case)), timeout=timedelta(seconds=60)
    )
