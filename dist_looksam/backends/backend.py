"""Interface between the engine and a data-parallel backend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..optim.seen import Seen
from ..optim.sharpness import Sharpness

# read(name, key, start, stop) -> entries [start, stop) of that slot, flat; None: not there.
Read = Callable[[str, str, int, int], Tensor | None]
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Piece:
    """This rank's part of one layer: entries [start, stop) of the flattened layer."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Ranks(Protocol):
    """The processes that train together. Every rank makes the same calls."""

    rank: int
    size: int
    ranks_may_join: bool  # while others train, so that not all have made the same calls

    def mean(self, numbers: Tensor) -> Tensor:
        """The mean of a small tensor over ranks. One collective, or none."""
        ...

    def gather(self, thing: Any) -> list[Any]:
        """Everybody's small picklable thing, in the order of ranks, on every rank."""
        ...


class Stored(Protocol):
    """Where weights and state are: what a checkpoint reads and writes.

    Attributes:
        module: the user's own module, for names and buffers.
        copies: (number of ranks that hold the same pieces, which of them this one is).
    """

    module: nn.Module
    copies: tuple[int, int]

    def pieces(self) -> list[Piece]:
        """This rank's part of every layer, in the same order as `slots`; last of frozen ones that
        are cut up."""
        ...

    def slots(self) -> list[dict[str, Tensor]]:
        """For each piece, its fp32 weight ("weight") and all state of its shape by key, flat."""
        ...

    def counters(self) -> dict[str, Any]:
        """What a checkpoint holds besides slots, the same on every rank.

        The optimizer's counters; "keys" of the slots besides "weight"; "layers": name -> the
        base's state of this layer that is in no slot; "groups": in each its "layers" and
        "settings"; "base": the name of its class; "loss_scale": {} or "scale" and "good" steps.

        Raises:
            ConfigError: a shard has state that is neither a number nor of the shard's shape.
        """
        ...

    def load(self, read: "Read", counters: dict[str, Any]) -> None:
        """Take weights and state from a checkpoint, written by any backend at any size."""
        ...

    def load_groups(self, settings: Sequence[dict[str, Any] | None]) -> None:
        """Take settings, one dictionary for each param group; None leaves a group's own."""
        ...

    def check_fits(self, counters: dict[str, Any]) -> None:
        """ConfigError if counters hold state of whole layers that the shards here cannot take."""
        ...

    def full_weights(self) -> dict[str, Tensor] | None:
        """The module's state_dict, fp32, on the host; on rank 0, None elsewhere. Collective."""
        ...


class Backend(Ranks, Stored, Protocol):
    """How gradients become means over ranks, and how weights become visible to forward.

    A step is: backward, (perturb, backward,) update.

    Attributes:
        name: as in `--backend`.
        optimizer: decides and counts; its `rule` says what to do.
        whole_gradients: every rank can have its own gradient of all layers, for `local`.
    """

    name: str
    optimizer: Sharpness
    whole_gradients: bool

    def backward(self, batches: Sequence[Any], loss: Loss, *, average: bool = True) -> Tensor:
        """Replace the gradients by the mean over all micro-batches of all ranks.

        `average` False: over this rank's own. Returns the mean loss of this rank, 0-dim.
        """
        ...

    def perturb(self, *, local: bool) -> bool:
        """Keep w and g, make w + eps visible. `local`: each rank its own eps.

        False, the same on all ranks, if g is known not to be finite: then `skip` follows.
        """
        ...

    def update(self) -> Seen:
        """Weights back, base optimizer's step, g_v remembered, new weights visible."""
        ...

    def skip(self) -> Seen:
        """Give the step up after its first pass: weights and state as before it."""
        ...

    def abandon(self) -> None:
        """After an exception: weights back, and nothing left of the step that had begun."""
        ...

    def evaluate(self, forward: Callable[[nn.Module], Tensor]) -> Tensor:
        """forward(model) with the weights and the arithmetic of training; no gradients."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes this rank holds between steps: weights, masters, base_state, g_v; look: what a look
        adds while it lasts."""
        ...
