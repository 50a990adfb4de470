"""Reads and writes a rank's pieces of layers and of optimizer state, for checkpoints."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..optim.sharpness import Sharpness
from .averages import KEY, Averages
from .backend import Piece, Read
from .flat import NO_GROUP, Flat
from .names import name_in

PLAIN_TENSORS = (Tensor, nn.Parameter)
# These settings choose a kernel for the device and do not change the result.
KERNEL_SETTINGS = {"foreach", "fused", "capturable", "differentiable"}


def like_the_layer(state: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
    """State with an entry for every weight; never "step", which has the shape of 0-dim layers."""
    return {
        k: v
        for k, v in state.items()
        if type(v) in PLAIN_TENSORS and v.shape == param.shape and k != "step"
    }


class StoredLayers:
    """The part of a backend that checkpoints use. See `Backend` for the methods."""

    module: nn.Module
    optimizer: Sharpness
    rank: int
    ema: Averages | None = None

    # Backends override these.

    def held(self) -> Sequence[Flat]:
        """Trained layers, or this rank's shards of them, then shards of frozen ones. Frozen layers
        that every rank holds whole are not included."""
        raise NotImplementedError

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter or buffer, gathered from all ranks; at least on rank 0. Collective."""
        return tensor.detach()

    def after_load(self) -> None:
        """Make weights written to `held` visible to forward."""

    def read_scale(self) -> dict[str, Any]:
        """fp16's loss scale; {} without one."""
        raise NotImplementedError

    def write_scale(self, saved: dict[str, Any]) -> None:
        """Restore the loss scale; {} leaves it unchanged."""
        raise NotImplementedError

    # The same for all backends.

    def pieces(self) -> list[Piece]:
        return [p for flat in self.held() for p in flat.pieces]

    def slots(self) -> list[dict[str, Tensor]]:
        if self.ema is not None:
            self.ema.check_not_swapped("a checkpoint")
        slots: list[dict[str, Tensor]] = []
        for flat in self.held():
            state = like_the_layer(self._state(flat), flat.master)
            average = None if self.ema is None else self.ema.of(flat)
            if average is not None:
                state[KEY] = average
            rows = {k: flat.read(v) for k, v in {"weight": flat.master.detach(), **state}.items()}
            slots += [{k: v[i] for k, v in rows.items()} for i in range(len(flat.pieces))]
        return slots

    def counters(self) -> dict[str, Any]:
        trained = [flat for flat in self.held() if flat.group != NO_GROUP]
        keys = {k for flat in trained for k in like_the_layer(self._state(flat), flat.master)}
        return {
            **self.optimizer.counters(),
            "keys": sorted(keys),
            "layers": {p.name: self._rest(flat) for flat in trained for p in flat.pieces},
            "groups": self._groups(),
            "base": type(self.optimizer.base_optimizer).__name__,
            "loss_scale": self.read_scale(),
        }

    def _state(self, flat: Flat) -> dict[str, Any]:
        return {} if flat.group == NO_GROUP else self.optimizer.state.get(flat.master, {})

    def _rest(self, flat: Flat) -> dict[str, Any]:
        """State of a flat that is not laid out as the flat."""
        state = self._state(flat)
        like = like_the_layer(state, flat.master)
        rest = {k: v for k, v in state.items() if k not in like}
        if not flat.whole:
            refuse_shaped(rest, flat, self.optimizer.base_optimizer)
        return rest

    def check_fits(self, counters: dict[str, Any]) -> None:
        """See `Backend.check_fits`."""
        for flat in self.held():
            for piece in flat.pieces if not flat.whole else ():
                rest = counters["layers"].get(piece.name, {})
                refuse_shaped(rest, flat, self.optimizer.base_optimizer)

    def check_state(self) -> None:
        """ConfigError if a shard has state that is neither a number nor of the shard's shape."""
        for flat in self.held():
            self._rest(flat)

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [
            {"layers": [], "settings": {k: v for k, v in group.items() if k != "params"}}
            for group in self.optimizer.param_groups
        ]
        for flat in self.held():
            if flat.group != NO_GROUP:
                groups[flat.group]["layers"] += [p.name for p in flat.pieces]
        return groups

    @torch.no_grad()
    def load(self, read: Read, counters: dict[str, Any]) -> None:
        if self.ema is not None:
            self.ema.check_not_swapped("a restore")
        for flat in self.held():
            weights = [read(p.name, "weight", p.start, p.stop) for p in flat.pieces]
            flat.write_(flat.master.detach(), weights)
            if flat.group == NO_GROUP:
                continue
            state = self._read_state(flat, read, counters)
            if state:
                self.optimizer.state[flat.master] = state
            else:
                self.optimizer.state.pop(flat.master, None)
        if self.ema is not None:
            self.ema.load(self.held(), read)
        self.after_load()
        self.optimizer.load_counters(counters)
        self.write_scale(counters["loss_scale"])

    def _read_state(self, flat: Flat, read: Read, counters: dict[str, Any]) -> dict[str, Any]:
        """A flat's state in the dtypes of the checkpoint.

        Where layers of a flat differ in a number, such as their steps, it takes the largest.
        """
        before, state = self._state(flat), {}
        for key in counters["keys"]:
            if key == "g_v" and not self.optimizer.rule.reuses_gv:
                continue  # of another method; a later look of this one would not renew it
            values = [read(p.name, key, p.start, p.stop) for p in flat.pieces]
            dtypes = [v.dtype for v in values if v is not None]
            if dtypes:
                tensor = before.get(key)  # DeepSpeed keeps references to it
                if not isinstance(tensor, Tensor) or tensor.dtype != dtypes[0]:
                    tensor = torch.zeros_like(flat.master.detach(), dtype=dtypes[0])
                flat.write_(tensor, values)
                state[key] = tensor
        group = self.optimizer.param_groups[flat.group]
        rows = [counters["layers"].get(p.name, {}) for p in flat.pieces]
        for key in sorted({k for row in rows for k in row}):
            value = _largest([row[key] for row in rows if key in row])
            if key == "step" and isinstance(value, Tensor):
                state[key] = _placed_step(value, flat.master, group)
            else:
                state[key] = _placed(value, flat.master.device)
        return state

    def load_groups(self, settings: Sequence[dict[str, Any] | None]) -> None:
        """See `Backend.load_groups`."""
        base = self.optimizer.base_optimizer
        for groups in (self.optimizer.param_groups, base.param_groups):  # under DeepSpeed two lists
            for group, saved in zip(groups, settings, strict=False):
                for name, value in (saved or {}).items():
                    if name in KERNEL_SETTINGS:
                        continue
                    own = group.get(name)
                    if isinstance(own, Tensor):  # of a compiled or captured step
                        own.copy_(torch.as_tensor(value))
                    else:
                        group[name] = _placed(value, None)

    # Averages of the weights.

    def average_weights(self, step: int) -> None:
        """See `Backend.average_weights`."""
        if self.ema is not None:
            self.ema.update_(self.held(), step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See `Backend.averaged`."""
        assert self.ema is not None
        self.ema.check_not_swapped("a second `averaged`")
        self.ema.swap_(self.held())
        try:
            self.after_load()
            yield
        finally:
            self.ema.swap_(self.held())
            self.after_load()

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor] | None:
        """See `Backend.full_weights`."""
        by_id: dict[int, Tensor | None] = {}
        weights: dict[str, Tensor] = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):  # the result of a module's get_extra_state
                continue
            if id(tensor) not in by_id:
                whole = self.whole(tensor).detach()
                whole = whole.float() if whole.is_floating_point() else whole
                by_id[id(tensor)] = whole.cpu() if self.rank == 0 else None
            value = by_id[id(tensor)]
            if value is not None:  # cloned, since names may share memory: tied, or in one row
                clone = value.clone(memory_format=torch.contiguous_format)
                weights[name_in(self.module, name)] = clone
        return None if self.rank else weights


def watch_first_step(backend: StoredLayers) -> None:
    """After the base's first step, ConfigError where its state does not fit shards: a checkpoint
    could not hold it, and the base would compute something else from a shard than from a layer."""

    def check(base: Optimizer, *_: Any) -> None:
        if base.state:
            handle.remove()
            backend.check_state()

    handle = backend.optimizer.base_optimizer.register_step_post_hook(check)


def refuse_state_dict(base: Optimizer) -> None:
    """state_dict and load_state_dict of an optimizer over this rank's shards raise ConfigError."""

    def refuse(*_: Any) -> None:
        raise ConfigError(
            "state_dict and load_state_dict must be left to checkpoints once Engine has sharded "
            "the optimizer, which then knows this rank's shards alone, got a call of one; use "
            "dist_looksam.checkpoint.save(engine, folder) and restore(engine, folder)."
        )

    base.register_state_dict_pre_hook(refuse)
    base.register_load_state_dict_pre_hook(refuse)


def refuse_shaped(rest: dict[str, Any], flat: Flat, base: Optimizer) -> None:
    """ConfigError if a shard has state that is neither a number nor of the shard's shape."""
    for key, value in rest.items():
        if isinstance(value, Tensor) and value.ndim > 0:
            raise ConfigError(
                f"a base optimizer on shards must keep one number or one entry per weight, got "
                f"{type(base).__name__} with {key} of shape {list(value.shape)} for a shard of "
                f"{flat.pieces[0].name} of shape {list(flat.master.shape)}; use another base, or "
                f"a backend that keeps layers whole (plain, ddp, horovod)."
            )


def _largest(values: list[Any]) -> Any:
    """The largest of numbers; the first of other values."""
    numbers = all(
        isinstance(v, int | float) or (isinstance(v, Tensor) and v.ndim == 0) for v in values
    )
    return max(values, key=float) if numbers else values[0]


def _placed(value: Any, device: torch.device | None) -> Any:
    """A copy of a value; tensors in it on `device`, unless that is None."""
    if isinstance(value, Tensor):
        return value.clone() if device is None else value.to(device, copy=True)
    if isinstance(value, dict):
        return {k: _placed(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_placed(v, device) for v in value)
    return value


def _placed_step(step: Tensor, param: Tensor, group: dict[str, Any]) -> Tensor:
    """On the device where torch's optimizers keep "step": the parameter's only for some kernels."""
    if group.get("capturable") or group.get("fused"):
        return step.to(param.device, torch.float32, copy=True)
    return step.clone()
