"""Horovod's ranks, forked from a process that has imported everything."""

from collections.abc import Callable
from pathlib import Path

import forks
import horovod.torch  # noqa: F401 - so that forked ranks need not
from horovod.runner import gloo_run
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousServer


def start(ranks: int, work: Callable[[], int], log: Path, **env) -> tuple[RendezvousServer, list]:
    """work() on so many ranks, with horovodrun's rendezvous server; that, and their process ids."""
    slots = get_host_assignments(parse_hosts(f"localhost:{ranks}"), ranks)
    server = RendezvousServer()
    port = server.start()
    server.init(slots)
    env |= gloo_run.create_run_env_vars("127.0.0.1", ["lo"], str(port))
    envs = [env | gloo_run.create_slot_env_vars(slot) for slot in slots]
    return server, [forks.fork(work, log, **own) for own in envs]


def run(ranks: int, work: Callable[[], int], log: Path) -> None:
    """work() on so many ranks, to its end. AssertionError, after what they said, if one fails."""
    server, children = start(ranks, work, log)
    try:
        forks.finish(children)
    except AssertionError:
        print(log.read_text()[-6000:])
        raise
    finally:
        server.stop()
