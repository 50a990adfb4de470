"""Access to DeepSpeed's tensors: every private name of the library is in this file.

A flat (see flat.py) is a partition of one param group (stages 1 and 2), of one sub-group (stage 3),
or a whole layer (stage 0).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import ConfigError
from ...optim.checks import check_inside
from ...optim.later import Later
from ..backend import Piece
from ..flat import NO_GROUP, Flat, cut
from ..names import name_in

VERSIONS = ("0.19.",)
_CHECK = "is_invalid_grad_norm"  # in the modules of DeepSpeed's optimizers; early 0.19 have none


def check_version(version: str) -> None:
    """ConfigError unless this is a DeepSpeed whose private names are known."""
    if not version.startswith(VERSIONS):
        raise ConfigError(
            f"deepspeed must be 0.19.x, got {version}; its private names differ between versions: "
            f"pip install 'deepspeed==0.19.8'."
        )


class Layout:
    """The flats of one engine, and their gradients at an accumulation boundary.

    Args:
        engine: a DeepSpeedEngine around a client optimizer of ours.
        client: that optimizer.
        stage: of ZeRO, 0 to 3.
    """

    def __init__(self, engine: Any, client: Any, stage: int) -> None:
        self.engine, self.client, self.stage = engine, client, stage
        self.zero = engine.optimizer
        named = engine.module.named_parameters()
        self.names = {id(p): name_in(engine.module, n) for n, p in named}
        makers = {0: self._whole_layers, 3: self._sub_groups}
        self.flats = list(makers.get(stage, self._partitions)())
        self.sharded_bf16 = hasattr(self.zero, "fp32_groups_gradient_flat_partition")

    @property
    def whole_gradients(self) -> bool:
        """Before a boundary every rank has its own gradient of all layers: see `visible`."""
        return self.stage == 0 or (self.stage == 1 and not self.offloads)

    @property
    def offloads(self) -> bool:
        """Masters and their gradients are on the host."""
        return self.stage > 0 and bool(self.engine.zero_use_cpu_optimizer())

    @property
    def waits(self) -> bool:
        """The host must know before DeepSpeed's step whether gradients are finite: for a loss scale
        or a scheduler, with offload, or where DeepSpeed looks for itself."""
        looks = self.stage > 0 and not hasattr(self._library, _CHECK)
        looks = looks or getattr(self.zero, "check_grad_overflow", False)  # at stages 1 and 2
        fp16, scheduler = self.engine.fp16_enabled(), self.engine.lr_scheduler
        return bool(looks or fp16 or scheduler is not None or self.offloads)

    @property
    def _library(self) -> Any:
        """DeepSpeed's module of this kind of optimizer; ours at stage 0."""
        return sys.modules[type(self.zero).__module__]

    @property
    def group(self) -> Any:
        """The process group whose ranks split the layers; None for all."""
        return getattr(self.zero, "dp_process_group", None)

    def _whole_layers(self) -> Iterator[Flat]:
        for number, group in enumerate(self.client.param_groups):
            check_inside(group["params"], self.engine.module)
            for p in group["params"]:
                piece = Piece(self.names[id(p)], tuple(p.shape), 0, p.numel())
                yield Flat(p, number, (piece,), (0,))

    def _partitions(self) -> Iterator[Flat]:
        """Stages 1, 2: a group's layers in a row, cut into equal partitions by rank."""
        zero = self.zero
        groups = getattr(zero, "bit16_groups", None) or zero.bf16_groups
        masters = getattr(zero, "single_partition_of_fp32_groups", None)
        masters = zero.fp32_groups_flat_partition if masters is None else masters
        for number, (layers, master) in enumerate(zip(groups, masters, strict=True)):
            rank = dist.get_rank(zero.real_dp_process_group[number])
            low = rank * master.numel()
            yield cut(layers, self.names, master, number, low)

    def _sub_groups(self) -> Iterator[Flat]:
        """Stage 3: every layer is cut by rank on its own; a sub-group is a row of such cuts."""
        zero = self.zero
        for sub, layers in enumerate(zero.fp16_groups):
            master = zero.fp32_partitioned_groups_flat[sub]
            pieces, offsets = [], []
            for p in layers:
                _, offset, length = zero.grad_position[zero.get_param_id(p)]
                pieces.append(self._piece(p, length))
                offsets.append(offset)
            number = zero.sub_group_to_group_id[sub]
            yield Flat(master, number, tuple(pieces), tuple(offsets))

    def _piece(self, p: Any, length: int) -> Piece:
        """Stage 3: this rank's piece of a layer that is cut into pieces of `length` entries."""
        start = min(dist.get_rank(self.group) * length, p.ds_numel)
        stop = min(start + length, p.ds_numel)  # the rest is padding
        return Piece(self.names[id(p)], tuple(p.ds_shape), start, stop)

    def frozen(self) -> list[Flat]:
        """Stage 3: this rank's piece of every layer that is not trained."""
        trained = {p.name for flat in self.flats for p in flat.pieces}
        params = self.engine.module.parameters() if self.stage == 3 else ()
        return [
            Flat(p.ds_tensor.detach(), NO_GROUP, (self._piece(p, p.ds_tensor.ds_numel),), (0,))
            for p in params
            if self.names[id(p)] not in trained
        ]

    # Gradients, still multiplied by the loss scale.

    def gradients(self) -> list[Tensor]:
        """One shard per layer, flat after flat, after the last backward of a step."""
        return [g for n, flat in enumerate(self.flats) for g in self._of_flat(n, flat)]

    def _of_flat(self, number: int, flat: Flat) -> list[Tensor]:
        if self.sharded_bf16:
            return flat.views(self.zero.fp32_groups_gradient_flat_partition[number])
        if flat.master.grad is not None:  # at stage 0, and with offload
            return flat.views(flat.master.grad)
        if self.stage == 0:
            return [v[:0] for v in flat.views(flat.master)]
        fragments = self.zero.averaged_gradients[number]
        whole = getattr(fragments, "flat_partition", None)
        if whole is not None:
            return flat.views(whole)
        return _walk(fragments, flat)

    def visible(self) -> tuple[list[Tensor], list[Tensor]]:
        """Stages 0 and 1 in fp32, before a boundary: the layers that forward sees, this rank's
        gradients. Both in the order of the flats' pieces."""
        if self.stage == 0:
            params = [f.master for f in self.flats]
            return params, [_or_zero(f.master.grad, f.master) for f in self.flats]
        layers = [p for group in self.zero.bit16_groups for p in group]
        return layers, [_or_zero(self.zero.get_gradient_for_reduction(p), p) for p in layers]

    def set_gradients(self, means: Sequence[Tensor]) -> None:
        """Replace the gradients that DeepSpeed's next step takes; after `reset_pass`.

        Args:
            means: one fp32 tensor for each flat, of its master's shape; multiplied in place by the
                loss scale. A value that is not finite is an overflow for DeepSpeed, too, unless
                it offloads, where it looks at what backward has left.
        """
        self.engine.set_gradient_accumulation_boundary(True)
        scale = self.scale()
        if scale != 1.0:
            torch._foreach_mul_(list(means), scale)
        for number, (flat, mean) in enumerate(zip(self.flats, means, strict=True)):
            if self.stage == 0:
                flat.master.grad = mean
            elif self.offloads:
                assert flat.master.grad is not None  # DeepSpeed's buffer on the host
                flat.master.grad.copy_(mean)
            else:
                self.zero.averaged_gradients[number] = [mean]

    def reset_pass(self) -> None:
        """After an exception within a pass: clear gradients, buckets and gathered layers.

        Leaves the state that `step` of DeepSpeed's optimizer leaves. Local.
        """
        zero = self.zero
        for p in self.engine.module.parameters():
            p.grad = None  # stage 3's zero_grad raises on a CPU where there is one
        zero.zero_grad()
        if self.stage == 0 or self.sharded_bf16:
            return
        if not (zero.offload_optimizer if self.stage == 3 else zero.cpu_offload):  # a buffer there
            for flat in self.flats:
                flat.master.grad = None
        hooks = zero._backward_hook_state
        hooks.reset_for_new_step()
        hooks.backward_active_depth = hooks.remaining_grad_acc_hooks = 0
        reduced = zero.params_already_reduced  # a list, at stage 3 a dict
        for number in list(reduced) if self.stage == 3 else range(len(reduced)):
            reduced[number] = False
        if self.stage == 3:
            for bucket in zero.ipg_buckets.values():
                bucket.clear_params()
            zero.averaged_gradients = {}
            zero.parameter_offload.release_backward_leftovers()
            zero.parameter_offload.partition_all_parameters()
            return
        for bucket in zero.ipg_buckets.values():
            bucket.clear()
        zero.extra_large_param_to_reduce.clear()
        zero._clear_previous_reduced_grads()
        zero._release_ipg_buffers()
        zero.micro_step_id = -1
        for number in zero.averaged_gradients:
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()

    def scale(self) -> float:
        """The loss scale; 1 where there is none."""
        if self.stage == 0 or self.sharded_bf16:
            return 1.0
        return float(self.zero.loss_scale)

    @contextmanager
    def fixed_scale(self) -> Iterator[None]:
        """Inside, steps of DeepSpeed's do not change the loss scaler's counters."""
        scaler = getattr(self.zero, "loss_scaler", None)
        before = dict(vars(scaler)) if scaler is not None else {}
        try:
            yield
        finally:
            if scaler is not None:
                vars(scaler).update(before)

    @contextmanager
    def known(self, sq_norm: Tensor) -> Iterator[None]:
        """Inside, steps of DeepSpeed's take this squared norm of the gradient, 0-dim, in place of
        one of their own, and do not ask the device whether it is finite: see `waits`."""
        if self.stage == 0:
            yield
            return
        norm = sq_norm.sqrt().float()
        if self.sharded_bf16:
            replaced = _replaced(self._library, "get_global_norm_of_tensors", norm)
        elif self.stage == 3:
            replaced = _replaced(self.zero, "_get_norm_groups", [norm])
        else:
            replaced = _replaced(self.zero, "scaled_global_norm", norm)
        with replaced, _replaced(self._library, _CHECK, False):
            yield

    def report(self, applied: Later | bool) -> None:
        """What `was_step_applied` of DeepSpeed's engine says of the last step."""
        self.engine._step_applied = applied

    def overflowed(self) -> None:
        """Count an overflow that DeepSpeed's own step has not seen, as that step would."""
        scaler = getattr(self.zero, "loss_scaler", None)
        if scaler is not None:
            scaler.update_scale(True)

    def read_scale(self) -> dict[str, float]:
        """The state of a dynamic loss scale, for a checkpoint; {} without one."""
        scaler: Any = getattr(self.zero, "loss_scaler", None)
        if not hasattr(scaler, "last_overflow_iter"):
            return {}
        good = int(scaler.cur_iter - scaler.last_overflow_iter - 1)
        scale, hysteresis = float(scaler.cur_scale), int(scaler.cur_hysteresis)
        return {"scale": scale, "good": good, "hysteresis": hysteresis}

    def write_scale(self, saved: dict[str, float]) -> None:
        """Restore the loss scale; {} leaves it unchanged."""
        scaler: Any = getattr(self.zero, "loss_scaler", None)
        if saved and hasattr(scaler, "last_overflow_iter"):
            scaler.cur_scale = saved["scale"]
            scaler.last_overflow_iter = scaler.cur_iter - saved["good"] - 1
            scaler.cur_hysteresis = saved.get("hysteresis", scaler.delayed_shift)

    # Making the master weights visible to forward.

    def publish(self) -> None:
        """Copy the masters to the weights that forward uses; one all-gather if masters are cut."""
        if self.stage == 0:
            return
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for sub in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(sub)
        self.zero.invalidate_secondary_tensor()  # of zero_hpz_partition_size
        persistent = self.zero.persistent_parameters
        if (
            persistent
        ):  # which stay gathered between steps, and a gathered one is not gathered again
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, this function of a module, or method of an object, returns `value`."""
    before = vars(owner).get(name)
    setattr(owner, name, lambda *_, **__: value)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _walk(fragments: Sequence[Tensor], flat: Flat) -> list[Tensor]:
    """Shards out of consecutive fragments of the flat."""
    starts, at = {}, 0
    for fragment in fragments:
        starts[at] = fragment.view(-1)
        at += fragment.numel()
    shards = []
    for piece, offset in zip(flat.pieces, flat.offsets, strict=True):
        length = piece.stop - piece.start
        if length == 0:
            shards.append(flat.master[:0])
        elif offset in starts and starts[offset].numel() >= length:
            shards.append(starts[offset][:length])
        else:
            shards.append(torch.cat([f.view(-1) for f in fragments])[offset : offset + length])
    return shards
