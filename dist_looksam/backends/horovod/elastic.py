"""Elastic Horovod: workers come and go, and the run goes on from its newest checkpoint.

A commit is a checkpoint on disk and not, as in Horovod's own `TorchState`, a copy in memory: a
killed rank takes its slice of a sharded state with it, and a checkpoint can be read by any number
of ranks. Every start over builds everything anew, so nothing of a lost worker's time survives.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import horovod.torch as hvd
from horovod.common.elastic import ObjectState

Train = Callable[..., dict[str, Any] | None]


def run(train: Train, settings: Any, world: Any) -> dict[str, Any] | None:
    """train(settings, world, commit=...), again from the newest checkpoint after every change.

    A lost worker interrupts the collective that waits for it; a new one is let in at a checkpoint.
    The world is what Horovod says now, since the launcher's variables are of the first start.
    """
    if not hvd.is_initialized():
        hvd.init()

    def attempt(state: ObjectState) -> dict[str, Any] | None:
        now = replace(
            world,
            rank=hvd.rank(),
            size=hvd.size(),
            local_rank=hvd.local_rank(),
            local_size=hvd.local_size(),
        )

        def commit() -> None:
            state.began = True
            state.commit()

        # Rank 0 is always one that has been there before, and `state` is as it says.
        return train(replace(settings, resume="auto") if state.began else settings, now,
                     commit=commit)  # fmt: skip

    state = ObjectState(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, began=False)
    return hvd.elastic.run(attempt)(state)
