"""Elastic Horovod: when workers join or leave, the run goes on from its newest checkpoint.

A commit is a checkpoint on disk and not, as in Horovod's own `TorchState`, a copy in memory: a
killed rank loses its slice of a sharded state, and any number of ranks can read a checkpoint.
Every restart builds everything anew.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import horovod.torch as hvd
from horovod.common.elastic import ObjectState

Train = Callable[..., dict[str, Any] | None]


def run(train: Train, settings: Any, world: Any) -> dict[str, Any] | None:
    """train(settings, world, commit=...), again from the newest checkpoint after every change.

    A lost worker interrupts the collective that waits for it; a new one joins at a checkpoint. The
    world is Horovod's, since the launcher's variables are those of the first start.
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

        # Rank 0 is never a new worker, and all ranks have its `state`.
        return train(replace(settings, resume="auto") if state.began else settings, now,
                     commit=commit)  # fmt: skip

    state = ObjectState(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, began=False)
    return hvd.elastic.run(attempt)(state)
