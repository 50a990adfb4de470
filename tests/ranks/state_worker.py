"""Every backend on two ranks: what a checkpoint holds and refuses, and the names of its weights.

python state_worker.py RANKS FOLDER     the cases: FOLDER/cases.json, {"on": backend or ZeRO stage}
"""

import importlib
import os
import tempfile
from pathlib import Path

import cases
import forks
import task
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from dist_looksam import Engine, LookSAM, restore
from dist_looksam.backends import fsdp2_units
from dist_looksam.backends.zero import library as zero_library
from dist_looksam.checkpoint import Reader, save
from dist_looksam.errors import ConfigError
from dist_looksam.optim.sharpness import Sharpness


class Net(nn.Module):
    """Frozen layers, tied weights, running statistics, a convolution."""

    def __init__(self, frozen: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(1, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.fixed = nn.Linear(20, 6)
        self.into, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)
        self.out.weight = self.into.weight
        with torch.no_grad():
            self.fixed.weight.mul_(frozen)
        self.fixed.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.fixed(self.norm(self.conv(x[:, None])).flatten(1)))
        return self.last(self.out(torch.tanh(self.into(hidden))))


def engine_of(case: dict, frozen: float = 1.0) -> Engine:
    net = Net(frozen)
    if case["on"] == "fsdp2":
        fsdp2_units.shard(net, torch.device("cpu"))
    params = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:]}]
    how = {"momentum": 0.9} if case["base"] == "SGD" else {}
    if case["base"] == "Muon":  # of matrices alone
        groups = params = [p for p in params if p.ndim == 2]
    home = importlib.import_module(case.get("of", "torch.optim"))
    kind = getattr(home, case["base"])
    base = kind(groups, lr=0.05, **how)
    optimizer: Sharpness = LookSAM(params, base, rho=0.05, k=3)
    if isinstance(case["on"], int):
        config = {
            "train_micro_batch_size_per_gpu": task.BATCH // dist.get_world_size(),
            "zero_optimization": {"stage": case["on"], **case.get("zero", {})},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        return Engine(zero_library.open_engine(net, optimizer, config), loss=task.loss)
    return Engine(net, optimizer, task.loss)


def steps(engine: Engine, begin: int, end: int) -> Engine:
    for t in range(begin, end):
        engine.step(task.part(t, dist.get_rank(), dist.get_world_size(), 1))
    return engine


def folder_of(case: dict) -> Path:
    """One that all ranks share and no other case has."""
    made = [tempfile.mkdtemp(dir=os.environ.get("TMPDIR"))]
    dist.broadcast_object_list(made)
    return Path(made[0])


def goes_on(case: dict) -> dict:
    """A run and its continuation: what differs; names in the checkpoint and in full_weights."""
    whole = steps(engine_of(case), 0, 9)
    first = steps(engine_of(case), 0, 5)
    for group in first.optimizer.param_groups:
        group["rho"] = 0.07
    folder = folder_of(case)
    path = save(first, folder, {"epoch": 1})
    second = engine_of(case, frozen=0.0)
    found = restore(second, folder)
    rhos = [group["rho"] for group in second.optimizer.param_groups]
    for group in second.optimizer.param_groups:
        group["rho"] = 0.05
    weights = [e.backend.full_weights() for e in (whole, steps(second, 5, 9))]
    result = {"rhos": rhos, "step": found.step, "extra": found.extra, "passes": second.passes}
    result["held"] = {n: list(s) for n, s in Reader(path).tensor_shapes().items()}
    if dist.get_rank():
        return result
    result["differ"] = [n for n, w in weights[0].items() if not torch.equal(w, weights[1][n])]
    result["dtypes"] = {str(w.dtype) for w in weights[0].values()}
    return {**result, "names": list(weights[0])}


def across(case: dict) -> dict:
    """What one backend has written, read by another: the weights then, and the groups."""
    first = steps(engine_of(case), 0, 5)
    path = save(first, folder_of(case))
    second = engine_of({**case, "on": case["to"]}, frozen=0.0)
    restore(second, path)
    one, other = (e.backend.full_weights() for e in (first, second))
    decays = [group["weight_decay"] for group in second.optimizer.param_groups]
    differ = [n for n in one or () if not torch.equal(one[n], other[n])]
    return {"differ": differ, "decays": decays}


def refused(case: dict) -> dict:
    """The sentence that making the engine, or else the first step, ends with, if there is one."""
    try:
        steps(engine_of(case), 0, 1)
    except ConfigError as error:
        return {"says": str(error)}
    return {"says": None}


def distributed(case: dict) -> dict:
    """What torch.distributed.checkpoint gets of the optimizer, before and after a step."""
    said = []
    engine = engine_of(case)
    for _ in range(2):
        try:
            said.append(sorted(get_optimizer_state_dict(engine.module, engine.optimizer)["state"]))
        except ConfigError as error:
            said.append(str(error))
        engine.module.zero_grad()
        engine = steps(engine_of(case), 0, 1)
    return {"said": said}


KINDS = {"goes on": goes_on, "across": across, "refused": refused, "distributed": distributed}

if __name__ == "__main__":
    forks.load_deepspeed()
    cases.play(lambda case: KINDS[case["kind"]](case))
