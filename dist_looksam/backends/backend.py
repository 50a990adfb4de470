"""Interface between the engine and a data-parallel backend."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ..maths.together import Groups
from ..optim.seen import Seen
from ..optim.sharpness import Sharpness

if TYPE_CHECKING:
    from .averages import Averages

# read(name, key, start, stop) -> entries [start, stop) of that slot, flat; None: no such slot.
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
    ranks_may_join: bool  # during training: a new rank has not made the earlier calls

    def mean(self, numbers: Tensor) -> Tensor:
        """The mean of a small tensor over ranks. One collective, or none."""

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, in the order of ranks, on every rank."""


class Stored(Protocol):
    """Access to weights and state for checkpoints.

    Attributes:
        module: the user's own module, for names and buffers.
        replicas: (number of ranks that hold the same pieces, index of this rank among them).
        ema: averages of the weights over steps; None: none are kept.
    """

    module: nn.Module
    replicas: tuple[int, int]
    ema: "Averages | None"

    def pieces(self) -> list[Piece]:
        """This rank's part of every trained layer, then of every sharded frozen one; in the order
        of `slots`."""

    def slots(self) -> list[dict[str, Tensor]]:
        """For each piece, its fp32 weight ("weight") and all state of its shape by key, flat."""

    def counters(self) -> dict[str, Any]:
        """The contents of a checkpoint besides slots, the same on every rank.

        The optimizer's counters; "keys" of the slots besides "weight"; "layers": name -> the
        base's state of this layer that is in no slot; "groups": "layers" and "settings" of each;
        "base": the name of its class; "loss_scale": {} or "scale" and "good" steps.

        Raises:
            ConfigError: a shard has state that is neither a number nor of the shard's shape.
        """

    def load(self, read: "Read", counters: dict[str, Any]) -> None:
        """Load weights and state of a checkpoint by any backend on any number of ranks."""

    def load_groups(self, settings: Sequence[dict[str, Any] | None]) -> None:
        """Set the param groups' settings, one dictionary each; None leaves a group unchanged."""

    def check_fits(self, counters: dict[str, Any]) -> None:
        """ConfigError if counters hold state of whole layers that does not fit shards."""

    def full_weights(self) -> dict[str, Tensor] | None:
        """The module's state_dict, fp32, on the host; on rank 0, None elsewhere. Collective."""


class Backend(Ranks, Stored, Protocol):
    """Averages gradients over ranks, and makes changed weights visible to forward.

    A step is: backward, (perturb, backward,) update.

    Attributes:
        name: as in `--backend`.
        optimizer: the two-gradient optimizer, whose `rule` decides when to look.
    """

    name: str
    optimizer: Sharpness

    def backward(
        self,
        batches: Sequence[Any],
        loss: Loss,
        *,
        average: bool = True,
        onto: dict[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Replace the gradients by the mean over these micro-batches, of all ranks.

        Args:
            average: False: over this rank's own; where backward always reduces, it has no effect.
            onto: this rank's tensors to add to the gradients before they are averaged over ranks.

        Returns the mean loss of this rank, 0-dim.
        """

    # A look of several groups of samples, see maths/together.py. For each: backward, perturb_group,
    # backward, end_group. The last group's second backward is averaged, and gets `onto=take_sum()`.

    def climbing_ranks(self) -> list[int]:
        """How many ranks in a row may share a group: [1] is none but the own, [size] only all."""

    def averages(self, groups: Groups) -> bool:
        """Whether a group's first backward is to be averaged; `perturb_group` does the rest."""

    def perturb_group(self, groups: Groups) -> None:
        """After a group's first backward, which was averaged if `averages` says so: add g
        to the sum of g, make w + eps of the group visible to forward. No read from the device."""

    def end_group(self, groups: Groups, *, last: bool) -> None:
        """After a group's second backward: make w visible, add the gradient to its sum. After the
        last: the gradient and the kept g become means over groups and ranks; then `update`."""

    def take_sum(self) -> dict[Tensor, Tensor]:
        """The sum of the second passes' gradients so far, which is not kept."""

    def perturb(self) -> bool:
        """Keep w and g, make w + eps visible to forward.

        Returns False, the same on all ranks, if g is known not to be finite; then call `skip`.
        """

    def perturb_ahead(self) -> None:
        """Before the only pass of a step: keep w, make w + eps visible to forward, with eps against
        the base's momentum; nothing while it has none."""

    def update(self) -> Seen:
        """Restore w, step the base optimizer, store g_v, make the new weights visible."""

    def skip(self) -> Seen:
        """Skip the step after its first pass: weights and state as before it."""

    def abandon(self) -> None:
        """After an exception: undo the step, as if it had not begun."""

    def evaluate(self, forward: Callable[[nn.Module], Tensor]) -> Tensor:
        """forward(model) with the weights and the arithmetic of training; no gradients."""

    def average_weights(self, step: int) -> None:
        """After step `step`, counted from 1: take the weights into their moving average, on this
        rank's shards; nothing where `ema` is None. No communication."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the averages are the weights: for `evaluate` and `full_weights`. Collective."""

    def memory(self) -> dict[str, int]:
        """Bytes on this rank between steps: weights, masters, ema, base_state, g_v; look: added
        during a look."""
