"""Calls `fully_shard`, and checks modules that the user has sharded.

Between steps the weights are DTensors: a rank has some rows of each.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import ConfigError
from ..optim.checks import HALVES
from .plain import PRECISION_DTYPES
from .units import units


def shard(
    module: nn.Module,
    device: torch.device,
    *,
    precision: str = "fp32",
    shard_ranks: int | None = None,
) -> nn.Module:
    """`fully_shard` on every unit, then on the rest; returns the module.

    Args:
        module: the same on every rank; units on another device than `device` are moved one by one.
        precision: of forward and backward. Shards and the reduction of gradients are fp32.
        shard_ranks: neighbouring ranks that split each layer, a divisor of all ranks; default all.

    Raises:
        ConfigError: a parameter is a scalar, which has no rows.
    """
    for name, p in module.named_parameters():
        if p.ndim == 0:
            raise ConfigError(
                f"backend fsdp2 splits parameters by rows, got {name} without any; "
                f"give it the shape (1,), or use --backend ddp."
            )
    block = shard_ranks or dist.get_world_size()
    shape, names = (dist.get_world_size() // block, block), ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)["shard"]
    dtype = PRECISION_DTYPES[precision]
    fp32 = None if dtype is None else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=fp32)
    outermost = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=fp32, output_dtype=fp32)
    if dtype is not None:  # BatchNorm needs fp32 parameters with its fp32 statistics
        norm_policy = MixedPrecisionPolicy(output_dtype=dtype)
        for part in module.modules():
            if getattr(part, "track_running_stats", False) and not isinstance(part, FSDPModule):
                fully_shard(part, mesh=mesh, mp_policy=norm_policy)
    parts = units(module)
    for part in parts:
        if not isinstance(part, FSDPModule):
            # The last unit's backward follows its forward at once: it would be gathered again.
            reshard = part is not parts[-1]
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh, mp_policy=outermost)
    return module


def sharded_units(module: nn.Module) -> list[FSDPModule]:
    """Every unit of a module, itself included."""
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def trained(module: nn.Module) -> dict[str, DTensor]:
    """The parameters that are trained, by name. Call it between steps.

    Raises:
        ConfigError: they are not all split by rows over all ranks of one mesh, in fp32.
    """
    params: dict[str, DTensor] = {}
    meshes = set()
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if not isinstance(p, DTensor):
            raise ConfigError(
                f"Engine needs every trained parameter sharded, got {name} whole; call "
                f"fully_shard on the whole module, without ignored_params."
            )
        if tuple(p.placements) not in ((Shard(0),), (Replicate(), Shard(0))):
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
        params[name] = p
        meshes.add(p.device_mesh)
    if len(meshes) != 1 or not _covers(next(iter(meshes))):
        raise ConfigError(
            f"Engine needs one mesh over all {dist.get_world_size()} ranks, got "
            f"{[tuple(m.shape) for m in meshes]}; give fully_shard the same mesh everywhere."
        )
    return params


def _covers(mesh: DeviceMesh) -> bool:
    """Whether the mesh is of all ranks, or of this rank's block of as many neighbours."""
    size, members = mesh.size(), mesh.mesh.flatten().tolist()
    first = dist.get_rank() // size * size
    of_block = mesh.ndim == 1 and members == list(range(first, first + size))
    return size == dist.get_world_size() or (of_block and dist.get_world_size() % size == 0)


def visible_dtype(module: nn.Module) -> torch.dtype | None:
    """The 16-bit dtype in which forward sees the weights; None if it sees their own dtype."""
    dtypes = {_policy(unit).param_dtype for unit in sharded_units(module)} & set(HALVES)
    if len(dtypes) > 1:
        raise ConfigError(
            "Engine needs one 16-bit dtype, got float16 and bfloat16; give all units one policy."
        )
    return dtypes.pop() if dtypes else None


def check_norms(module: nn.Module) -> None:
    """ConfigError for BatchNorm with 16-bit weights beside its fp32 statistics."""

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
    """A unit's policy. Private names of torch 2.6 to 2.13: there is no public one."""
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
