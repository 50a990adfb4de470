"""The program train.py: trains as the settings say, and writes the run directory."""

import errno
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F

from ..errors import ConfigError, RunError
from ..record import rundir
from ..settings import assemble, config
from ..settings.config import Settings
from ..world import World
from ..world.roster import LostRank
from . import agree, dryrun, pretrained
from .fit import Fit
from .interrupt import INTERRUPTED, Interrupted

_NO_ROOM = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str]) -> int:
    """Train as the flags say. Exit code: 0 done, 1 the run failed or learnt nothing, 2 the settings
    are wrong, 130 Ctrl-C."""
    world = None
    try:
        settings = config.parse(argv)
        world = World.from_env(local_rank=settings.local_rank)
        if settings.dry_run:
            dryrun.main(settings, world)
        elif restarting := assemble.restarting(settings):
            restarting(run, settings, world)
        else:
            run(settings, world)
    except LostRank as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # on every rank that still runs
        os._exit(1)  # a destructor of the transport may wait for the lost rank
    except (ConfigError, RunError) as error:
        _complain(world, error)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt as error:
        if not isinstance(error, Interrupted):
            _complain(world, "interrupted; nothing was trained")
        return INTERRUPTED
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = error.filename or "a file of --out"
        print(f"error: {error.strerror}: {where}.", file=sys.stderr, flush=True)
        return 1
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _complain(world: World | None, error: Exception | str) -> None:
    """Print one line on rank 0 and, once the world is known, on the first rank of every other node,
    where alone files or devices may be missing."""
    if world is not None and world.rank and world.local_rank == 0:
        print(f"error on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
    elif (world or _likely_world()).rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)


def _likely_world() -> World:
    """The world, for an error in the flags or in the launcher's variables."""
    try:
        return World.from_env()
    except ConfigError:
        return World()


def run(
    settings: Settings, world: World, *, commit: Callable[[], None] | None = None
) -> dict[str, Any] | None:
    """Train on this rank. Returns the content of summary.json; None if a signal ended the run.

    `commit` is called on every rank after every checkpoint, and may raise to end the run there.

    Raises:
        ConfigError: before anything is trained. RunError: the run cannot go on.
    """
    # Without it MKL's rounding depends on the addresses of tensors, and a resumed run would differ.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    linear = F.linear  # DeepSpeed's stage 3 replaces it by one of other rounding, and leaves it so
    settings, device, data, roster = assemble.start(settings, world)
    hosts = roster.hosts if roster else [socket.gethostname()]
    with rundir.log_failure(Path(settings.out), world.rank), roster or nullcontext():
        try:
            data = agree.check(settings, data, world.size)
            fit = Fit(settings, data, device, commit, pretrained.begin(settings, world.size))
            if fit.first:
                rundir.record(fit.out, world, hosts, fit.device)
            return fit.run()
        finally:
            F.linear = linear
            rundir.release(Path(settings.out))
