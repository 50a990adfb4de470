"""What a user can get wrong around `fully_shard`: name -> (how, what the sentence says)."""

import task
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from dist_looksam import SAM, Engine, Lamb
from dist_looksam.backends.fsdp2_units import shard
from dist_looksam.errors import ConfigError


def engine(model: nn.Module, optimizer=None, **how) -> Engine:
    return Engine(model, optimizer or sgd(model), task.loss, **how)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def own_ascent() -> None:
    model = fully_shard(task.net())
    sam = SAM(model.parameters(), sgd(model))
    part = task.part(0, dist.get_rank(), dist.get_world_size(), 1)
    engine(model, sam, ascent="rank").step(part)


def before() -> None:
    model = task.net()
    optimizer = sgd(model)
    engine(fully_shard(model), optimizer)


def parts() -> None:
    model = task.net()
    fully_shard(model.first)
    engine(model)


def ignored() -> None:
    model = task.net()
    engine(fully_shard(model, ignored_params={model.shift}))


def columns() -> None:
    model = nn.Linear(4, 4)
    engine(fully_shard(model, shard_placement_fn=lambda p: Shard(p.ndim - 1)))


def unlike() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "rows"))
    model = task.net()
    with torch.no_grad():  # by as little as can be
        model.second.bias[1] = model.second.bias[1].nextafter(torch.tensor(float(dist.get_rank())))
    engine(fully_shard(model, mesh=mesh))


def half() -> None:
    engine(fully_shard(task.net().bfloat16()))


def policy() -> None:
    engine(fully_shard(task.net(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))


def no_policy() -> None:
    engine(fully_shard(task.net()), precision="fp16")


def used() -> None:
    model = fully_shard(task.net())
    optimizer = sgd(model)
    task.loss(model, task.part(0, 0, 1, 1)[0]).backward()
    optimizer.step()
    engine(model, optimizer)


def scalar() -> None:
    model = task.net()
    model.scalar = nn.Parameter(torch.tensor(1.0))
    shard(model, torch.device("cpu"))


def no_engine() -> None:
    model = fully_shard(task.net())
    optimizer = SAM(model.parameters(), sgd(model))
    optimizer.step(lambda: torch.zeros(()))


def beside_engine() -> None:
    """Weights did not move, and the counters did, so that a look was lost."""
    model = fully_shard(task.net())
    optimizer = SAM(model.parameters(), sgd(model))
    engine(model, optimizer)
    optimizer.step(lambda: torch.zeros(()))


def lamb() -> None:
    Lamb(fully_shard(task.net()).parameters()).step()


def no_sync() -> None:
    model = fully_shard(task.net())
    model.set_requires_gradient_sync(False)
    engine(model).step(task.part(0, 0, 1, 1))


def unfrozen() -> None:
    model = task.net()
    model.first.weight.requires_grad_(False)
    own = engine(fully_shard(model))
    model.first.weight.requires_grad_(True)
    own.step(task.part(0, 0, 1, 1))


def norm() -> None:
    """torch's dtype error in the first forward, though train.py keeps such a BatchNorm in fp32."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    engine(model, precision="bf16")


def norm_apart() -> None:
    """As the sentence says: it trains."""
    model = nn.Sequential(nn.Linear(7, 13), nn.BatchNorm1d(13), nn.Linear(13, 3))
    fully_shard(model[1], mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    own = engine(model, precision="bf16")
    if bool(own.step(task.part(0, dist.get_rank(), dist.get_world_size(), 1)).seen.finite):
        raise ConfigError("it trains")


def uneven() -> None:
    x, y = task.part(0, 0, 1, 1)[0]
    own = 3 + dist.get_rank()
    engine(fully_shard(task.net())).step([(x[:own], y[:own])])


def uneven_number() -> None:
    pair = task.part(0, 0, 1, 1)[0]
    engine(fully_shard(task.net())).step([pair] * (1 + dist.get_rank()))


MISTAKES = {
    "uneven number": (uneven_number, "equally many micro-batches a step, got 1 and 2"),
    "norm": (norm, "got torch.bfloat16 for 1 by MixedPrecisionPolicy; first call fully_shard on"),
    "norm apart": (norm_apart, "it trains"),
    "uneven": (uneven, "on all ranks, since each one's mean loss counts as much, got 3 and 4"),
    "before": (before, "got 9, 0 of them; make it over model.parameters() after fully_shard"),
    "parts": (parts, "needs fully_shard called on the whole module, got parts"),
    "ignored": (ignored, "every trained parameter sharded, got shift whole"),
    "columns": (columns, "split by rows over a mesh of one dimension, or of (replicate, shard)"),
    "unlike": (unlike, "different ones in 1 of 9 parameters, first second.bias; seed all ranks"),
    "half": (half, "needs fp32 weights, got shift in torch.bfloat16"),
    "policy": (policy, 'which is bf16, got fp32; give Engine precision="bf16"'),
    "no policy": (no_policy, "which is fp32, got fp16"),
    "used": (used, "must start without state, got some"),
    "rank": (own_ascent, "m must be 24 on backend fsdp2 with 1 x 2 micro-batches of 12, got 12 by"),
    "scalar": (scalar, "splits parameters by rows, got scalar without any"),
    "no sync": (no_sync, "got none; leave out set_requires_gradient_sync"),
    "unfrozen": (unfrozen, "got first.weight unfrozen after that; make another"),
    "no engine": (no_engine, "give the module and this optimizer to Engine"),
    "beside engine": (beside_engine, "got optimizer.step; call engine.step(micro_batches)"),
    "lamb": (lamb, "give the module and this optimizer to Engine"),
}


def said() -> dict[str, str]:
    """name -> the sentence, or what came instead of one."""
    found = {}
    for name, (how, _) in MISTAKES.items():
        try:
            how()
            found[name] = "nothing"
        except ConfigError as error:
            found[name] = str(error)
    return found
