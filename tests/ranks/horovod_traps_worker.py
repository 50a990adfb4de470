"""A rank of the tests of traps; rank 0 prints a line for each. horovodrun -np 2 python ..."""

import sys

import horovod.torch as hvd
import task
import torch
from zero_worker import optimizer_of

from dist_looksam import ConfigError, LookSAM
from dist_looksam.backends.horovod.sharded import HorovodSharded
from dist_looksam.backends.horovod.whole import Horovod, check_alike
from dist_looksam.backends.plain import Plain
from dist_looksam.engine import Engine
from dist_looksam.errors import RunError

CASE = {"optimizer": "look_sam", "base": "adamw"}


def spread(model: torch.nn.Module) -> float:
    flat = torch.cat([p.detach().view(-1) for p in model.parameters()])
    every = hvd.allgather(flat.view(1, -1), name="spread")
    return float((every - every[0]).abs().max())


def one_with_state():
    """Rank 0 has trained on, as one that has read a checkpoint; the others start afresh."""
    model = task.net()
    optimizer = optimizer_of(CASE, model)
    if hvd.rank() == 0:
        engine = Engine(Plain(model, optimizer), loss=task.loss)
        for step in range(4):
            engine.step(task.part(step, 0, 1, 1))
    return model, optimizer


def naive_order() -> float:
    model, _ = one_with_state()
    base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    if hvd.rank() == 0:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        kept = [p.detach().clone() for p in model.parameters()]
        base.step()
        for p, k in zip(model.parameters(), kept, strict=True):
            p.data.copy_(k)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(base, root_rank=0)
    try:
        check_alike(model)
    except RunError as error:
        if hvd.rank() == 0:
            print("found:", error)
    return spread(model)


def ours() -> tuple[float, int]:
    model, optimizer = one_with_state()
    engine = Engine(Horovod(model, optimizer), loss=task.loss)
    for step in range(4, 9):
        engine.step(task.part(step, hvd.rank(), hvd.size(), 1))
    return spread(model), len({*hvd.allgather_object(engine.optimizer.steps, name="steps")})


def beside() -> str:
    """optimizer.step where Engine has given the optimizer this rank's slices."""
    model = task.net()
    optimizer = optimizer_of(CASE, model)
    Engine(HorovodSharded(model, optimizer), loss=task.loss)
    try:
        optimizer.step(lambda: torch.zeros(()))
    except ConfigError as error:
        return str(error)
    return ""


def refused() -> str:
    model = task.net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    base = hvd.DistributedOptimizer(base, named_parameters=model.named_parameters())
    try:
        LookSAM(model.parameters(), base).step(lambda: 0)
    except ConfigError as error:
        return str(error)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    hvd.init()
    lines = [f"naive: {naive_order()}", "ours: {} {}".format(*ours()), f"refused: {refused()}"]
    lines.append(f"beside: {beside()}")
    if hvd.rank() == 0:
        print("\n".join(lines))
    hvd.shutdown()


if __name__ == "__main__":
    sys.exit(main())
