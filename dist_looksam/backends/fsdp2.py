"""torch's fully_shard: every rank has some rows of every layer, and the state of these rows.

The optimizer gets this rank's rows as plain tensors that share the DTensors' memory, so that any
torch optimizer can step on them and forward gathers the result. A look perturbs the shards and
restores them from a copy. Its second pass gathers and reduces as the first; the only other
communication are sums of a few numbers per layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import ConfigError
from ..maths.together import Groups
from ..optim.entrywise import check_entrywise
from . import fsdp2_units
from .alike import differing
from .backend import Loss, Piece
from .flat import NO_GROUP, Flat
from .names import name_in
from .plain import PRECISION_DTYPES, Plain
from .ranks import TorchRanks, average_, refuse_step
from .stored import refuse_state_dict, watch_first_step


class FSDP2(TorchRanks, Plain):
    """A module that `fully_shard` was called on. The process group must exist.

    Gradients of every micro-batch are reduced over ranks and accumulated in fp32 shards, so that no
    rank ever holds a whole gradient.

    Args:
        module: sharded by rows over a mesh of all ranks, or over (replicate, shard); or over a mesh
            of this rank's block of neighbours. Then this class averages over blocks: once a pass,
            and on a look only at its end, so that the groups of m may be blocks.
        optimizer: over its parameters, without state; this rank's rows replace the DTensors in its
            groups.
        precision: that of the module's MixedPrecisionPolicy; "fp16" adds a loss scale.

    Raises:
        ConfigError: the module or the optimizer is not as above, or its base needs whole layers.
    """

    name = "fsdp2"

    def __init__(self, module: nn.Module, optimizer: Any, *, precision: str = "fp32") -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.units = fsdp2_units.sharded_units(module)
        self._reshard()
        self.params = fsdp2_units.trained(module)
        mesh = next(iter(self.params.values())).device_mesh
        _check_precision(module, precision)
        fsdp2_units.check_norms(module)
        with torch.no_grad():
            self.shards = {n: p.to_local().detach() for n, p in self.params.items()}
        self.block = mesh.size()  # ranks that backward reduces over
        self.in_block = mesh.get_group() if mesh.ndim == 1 else None
        self.copies = None  # this rank's row in all blocks
        if self.block < self.size:
            rows = [list(range(r, self.size, self.block)) for r in range(self.block)]
            self.copies, _ = dist.new_subgroups_by_enumeration(rows)
        if mesh.ndim == 2 or self.copies is not None:
            self._check_replicas(mesh.get_group(0) if mesh.ndim == 2 else self.copies)
        if mesh.size(mesh.ndim - 1) > 1:
            check_entrywise(optimizer.base_optimizer, next(iter(self.shards.values())).device)
        self._replace_params(optimizer)
        super().__init__(module, optimizer, precision=precision)
        self.replicas = (self.size // self.block, self.rank // self.block)
        if mesh.ndim == 2:
            self.replicas = (mesh.size(0), mesh.get_local_rank(0))
        refuse_state_dict(optimizer.base_optimizer)
        watch_first_step(self)
        self._has_run = False  # true from the first forward on, which initialises torch's state
        self._hook = module.register_forward_pre_hook(self._note_first_forward)

    def _note_first_forward(self, *_: Any) -> None:
        self._hook.remove()
        self._has_run = True

    def _check_replicas(self, group: Any) -> None:
        """ConfigError if ranks that hold the same rows have different weights: torch allows it."""

        def largest(numbers: Tensor) -> Tensor:
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
            return numbers

        by_rank = self.gather(differing(list(self.shards.items()), largest))
        if differ := sorted({name for names in by_rank for name in names}):
            raise ConfigError(
                f"Engine needs the same weights on all ranks of a (replicate, shard) mesh, got "
                f"different ones in {len(differ)} of {len(self.shards)} parameters, first "
                f"{differ[0]}; seed all ranks alike, or load the same weights, before fully_shard."
            )

    def _replace_params(self, optimizer: Any) -> None:
        """Put this rank's rows in place of the DTensors in the optimizer's groups."""
        if optimizer.state:
            raise ConfigError(
                "a sharded optimizer must start without state, got some; load a checkpoint after "
                "the engine is made."
            )
        mine = {id(p): self.shards[n] for n, p in self.params.items()}
        groups = optimizer.param_groups
        ids = [id(p) for group in groups for p in group["params"] if p.requires_grad]
        if set(ids) != set(mine):
            raise ConfigError(
                f"the optimizer must be over the module's {len(mine)} sharded parameters, got "
                f"{len(ids)}, {len(set(ids) & set(mine))} of them; make it over "
                f"model.parameters() after fully_shard."
            )
        for group in groups:
            group["params"] = [mine[id(p)] for p in group["params"] if p.requires_grad]

    def bind(self) -> None:
        dtype = self.dtype
        self.optimizer.bind(reduce=self.reduce, visible_dtype=dtype, driver=refuse_step)

    def reduce(self, sums: Tensor) -> Tensor:
        """Add over the ranks that split a layer. One small all-reduce.

        Over all ranks, not per replica of the model: replicas might add in different orders, and
        would stay different after one rounding error.
        """
        sums = sums.to(self.device)
        dist.all_reduce(sums)
        return sums / self.replicas[0]

    def _reduce_in_block(self, sums: Tensor) -> Tensor:
        """As `reduce`, of numbers that each block has of its own."""
        sums = sums.to(self.device)
        dist.all_reduce(sums, group=self.in_block)
        return sums

    def average_(self, tensors: Sequence[Tensor], neighbours: int | None = None) -> None:
        """Replace shards by their mean over blocks: one all-reduce, none if there is one block."""
        if self.copies is not None:
            average_(tensors, self.copies)

    def _reshard(self) -> None:
        """Free the layers that a forward without a backward has left gathered."""
        for unit in self.units:
            unit.reshard()

    # Passes. Arithmetic in 16 bits is the policy's, not autocast's.

    def arithmetic(self) -> Any:
        return torch.autocast(self.device.type, enabled=False)

    def backward(
        self,
        batches: Sequence[Any],
        loss: Loss,
        *,
        average: bool = True,
        onto: dict[Tensor, Tensor] | None = None,
    ) -> Tensor:
        self._clear_gradients()  # the caller's own backward may have left some
        try:
            value = super().backward(batches, loss, average=average)
        except BaseException:
            self._reset_pass()
            raise
        for shard, total in (onto or {}).items():
            shard.grad = total if shard.grad is None else shard.grad.add_(total)
        if average:
            with torch.no_grad():
                self.average_(self.gradients())
        return value

    def climbing_ranks(self) -> list[int]:
        """See `Backend.climbing_ranks`: the ranks that backward reduces over."""
        return sorted({self.block, self.size})

    def perturb_group(self, groups: Groups) -> None:
        """See `Backend.perturb_group`."""
        of_block = groups.ranks < self.size
        self.optimizer.perturb_group(reduce=self._reduce_in_block if of_block else self.reduce)

    def _clear_gradients(self) -> None:
        """Of sharded and of currently gathered parameters."""
        for p in (*self.module.parameters(), *self.params.values()):
            p.grad = None

    def _reset_pass(self) -> None:
        """After an exception within a pass: free gathered layers and reset torch's state."""
        self._clear_gradients()  # before torch's reset, which keeps those of gathered layers
        reset = getattr(self.module, "reset_iter_state", None)  # not in the first torch versions
        if reset is not None and self._has_run:
            reset()
        else:
            self._reshard()

    @torch.no_grad()
    def finish_gradients(self, *, average: bool) -> None:
        """Give the optimizer's parameters the gradient shards that backward has reduced."""
        named = self._find_rows()
        for name, shard in self.shards.items():
            p = named[name]
            shard.grad = None if p.grad is None else p.grad.to_local()
            p.grad = None
        late = [n for n, p in named.items() if p.grad is not None]
        if late:
            raise ConfigError(
                f"Engine trains the parameters that required gradients when it was made, got "
                f"{late[0]} unfrozen after that; make another optimizer and Engine."
            )
        if not self.gradients():
            raise ConfigError(
                "Engine needs gradients that are reduced in every backward, got none; leave out "
                "set_requires_gradient_sync and set_requires_all_reduce."
            )

    def _find_rows(self) -> Any:
        """Free gathered layers, which would not use changed rows; the parameters by name, whose
        rows the optimizer then has."""
        self._reshard()
        named: Any = dict(self.module.named_parameters())
        for name, shard in self.shards.items():
            p = self.params[name] = named[name]
            if shard.data_ptr() != p.to_local().data_ptr():  # the caller has replaced them
                shard.data = p.to_local()
        return named

    def gradients(self) -> list[Tensor]:
        return [s.grad for s in self.shards.values() if s.grad is not None]

    @torch.no_grad()
    def evaluate(self, forward: Callable[[nn.Module], Tensor]) -> Tensor:
        """See `Backend.evaluate`. Every rank must make as many calls, since forward gathers."""
        try:
            return forward(self.module)
        except BaseException:
            self._reset_pass()
            raise
        finally:
            self._reshard()

    # The two-gradient step.

    def perturb(self) -> bool:
        """See `Backend.perturb`."""
        finite = self.optimizer.perturb()
        return (self.scaler is None and finite.is_cuda) or bool(finite)

    @torch.no_grad()
    def perturb_ahead(self) -> None:
        self._find_rows()
        super().perturb_ahead()

    # What a checkpoint needs.

    def _named(self) -> list[tuple[str, Tensor]]:
        return list(self.shards.items())

    def held(self) -> Sequence[Flat]:
        """This rank's rows of every layer."""
        self._reshard()
        group_of, flats = self.group_numbers(), []
        for name, p in self.params.items():
            shard = self.shards[name]
            flats.append(Flat(shard, group_of[id(shard)], (self._piece(name, p),), (0,)))
        for name, q in self.module.named_parameters():
            if name not in self.params and isinstance(q, DTensor):
                rows = q.to_local().detach()
                flats.append(Flat(rows, NO_GROUP, (self._piece(name, q),), (0,)))
        return flats

    def _piece(self, name: str, param: DTensor) -> Piece:
        return Piece(name_in(self.module, name), tuple(param.shape), *fsdp2_units.rows(param))

    def full_weights(self) -> dict[str, Tensor] | None:
        """See `Backend.full_weights`."""
        self._reshard()  # gathered weights may be rounded to 16 bits
        return super().full_weights()

    def whole(self, tensor: Tensor) -> Tensor:
        """See `StoredLayers.whole`: one gather."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _check_precision(module: nn.Module, precision: str) -> None:
    dtype = fsdp2_units.visible_dtype(module)
    if PRECISION_DTYPES[precision] != dtype:
        got = next(name for name, known in PRECISION_DTYPES.items() if known == dtype)
        raise ConfigError(
            f"precision must be that of the module's MixedPrecisionPolicy, which is {got}, got "
            f'{precision}; give Engine precision="{got}", or fully_shard another mp_policy.'
        )
