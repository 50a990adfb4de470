"""How `fully_shard` is called, and what a module that was given to it looks like.

The weights between steps are DTensors: a rank has some rows of each.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import ConfigError
from ..optim.checks import HALVES
from .plain import PRECISION_DTYPES
from .units import units


def shard(module: nn.Module, device: torch.device, *, precision: str = "fp32") -> nn.Module:
    """`fully_shard` on every unit, then on the rest, over all ranks; returns the module.

    Args:
        module: the same on every rank; what is not on `device` is moved there unit by unit.
        precision: "fp32", or the 16 bits that forward and backward see. Shards stay fp32, and
            gradients are added up over ranks in fp32.

    Raises:
        ConfigError: a parameter is a scalar, which has no rows.
    """
    for name, p in module.named_parameters():
        if p.ndim == 0:
            raise ConfigError(
                f"backend fsdp2 splits parameters by rows, got {name} without any; "
                f"give it the shape (1,), or use --backend ddp."
            )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    low = PRECISION_DTYPES[precision]
    high = None if low is None else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=high)
    outermost = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=high, output_dtype=high)
    if low is not None:  # BatchNorm takes fp32 parameters with its fp32 statistics alone
        whole = MixedPrecisionPolicy(output_dtype=low)
        for part in module.modules():
            if getattr(part, "track_running_stats", False) and not isinstance(part, FSDPModule):
                fully_shard(part, mesh=mesh, mp_policy=whole)
    parts = units(module)
    for part in parts:
        if not isinstance(part, FSDPModule):
            # The last one's backward follows its forward: what was freed would be gathered again.
            freed = part is not parts[-1]
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=freed)
    fully_shard(module, mesh=mesh, mp_policy=outermost)
    return module


def sharded_units(module: nn.Module) -> list[FSDPModule]:
    """Every unit of a module, itself included."""
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def trained(module: nn.Module) -> dict[str, DTensor]:
    """The parameters that are trained, by name; to be called between steps.

    Raises:
        ConfigError: they are not all split by rows over all ranks of one mesh, as fp32.
    """
    found: dict[str, DTensor] = {}
    meshes = set()
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if not isinstance(p, DTensor):
            raise ConfigError(
                f"Engine needs every trained parameter sharded, got {name} whole; call "
                f"fully_shard on the whole module, without ignored_params."
            )
        rows, copies = Shard(0), Replicate()
        if tuple(p.placements) not in ((rows,), (copies, rows)):
            raise ConfigError(
                f"Engine needs parameters split by rows over a mesh of one dimension, or of "
                f"(replicate, shard), got {name} with placements {tuple(p.placements)}; leave "
                f"out tensor parallelism and shard_placement_fn."
            )
        if p.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"Engine needs fp32 weights, got {name} in {p.dtype}; leave the module in fp32 "
                f"and give fully_shard MixedPrecisionPolicy(param_dtype={p.dtype})."
            )
        if p.device.type != p.device_mesh.device_type:
            raise ConfigError(
                f"Engine needs the shards on {p.device_mesh.device_type}, got {name} on "
                f"{p.device.type}; leave out CPUOffloadPolicy."
            )
        found[name] = p
        meshes.add(p.device_mesh)
    if len(meshes) != 1 or next(iter(meshes)).size() != dist.get_world_size():
        raise ConfigError(
            f"Engine needs one mesh over all {dist.get_world_size()} ranks, got "
            f"{[tuple(m.shape) for m in meshes]}; give fully_shard the same mesh everywhere."
        )
    return found


def visible_dtype(module: nn.Module) -> torch.dtype | None:
    """The 16 bits in which forward sees the weights; None if in their own dtype."""
    low = {_policy(unit).param_dtype for unit in sharded_units(module)}
    low &= set(HALVES)
    if len(low) > 1:
        raise ConfigError(
            "Engine needs one 16-bit dtype, got float16 and bfloat16; give all units one policy."
        )
    return low.pop() if low else None


def check_norms(module: nn.Module) -> None:
    """ConfigError for BatchNorm whose weights are seen in 16 bits, beside fp32 statistics."""

    def visit(part: nn.Module, name: str, dtype: torch.dtype | None) -> None:
        if isinstance(part, FSDPModule):
            dtype = _policy(part).param_dtype
        own = next(part.parameters(recurse=False), None)
        if getattr(part, "track_running_stats", False) and own is not None and dtype in HALVES:
            raise ConfigError(
                f"BatchNorm keeps its statistics in fp32 and must see its weights so, got {dtype} "
                f"for {name or 'the module'} by MixedPrecisionPolicy; first call fully_shard on it "
                f"with mp_policy=MixedPrecisionPolicy(output_dtype={dtype})."
            )
        for child_name, child in part.named_children():
            visit(child, f"{name}.{child_name}".lstrip("."), dtype)

    visit(module, "", None)


def _policy(unit: FSDPModule) -> MixedPrecisionPolicy:
    """What `fully_shard` was given. Private names of torch 2.6 to 2.13: there is no public one."""
    try:
        policy = unit._get_fsdp_state()._mp_policy
    except AttributeError as error:
        raise ConfigError(
            f"FSDP2 was written for torch 2.6 to 2.13, got {torch.__version__}, in which {error}; "
            f"install one of these or use DDP."
        ) from error
    assert isinstance(policy, MixedPrecisionPolicy)
    return policy


def rows(param: DTensor) -> tuple[int, int]:
    """This rank's entries [start, stop) of the flattened parameter."""
    mesh = param.device_mesh
    ranks, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    height = param.shape[0]
    share = -(-height // ranks)
    width = param.numel() // height if height else 0
    return min(rank * share, height) * width, min((rank + 1) * share, height) * width
