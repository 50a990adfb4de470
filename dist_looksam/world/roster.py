"""The ranks of a job, their hosts, and the detection of lost ranks by heartbeats.

Every rank sends heartbeats: it increments a key of the job's store, on rank 0 (under torchrun: in
its agent). A rank is *lost* when its heartbeats stop and it has not reported its end. gloo and NCCL
only notice that a neighbour is silent, and that neighbour may just be waiting for the lost rank.
"""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from ..errors import ConfigError, RunError
from .launchers import World

# Errors of gloo and the store when a peer is gone; NCCL's errors have a class of their own.
_CONNECTION_ERRORS = (
    *("Connection closed", "Connection reset", "Connection refused", "Connection timed out"),
    *("Connect timeout", "Timed out", "Socket Timeout", "Broken pipe", "connectFullMesh"),
)
_GRACE = 3.0  # seconds between two heartbeats that a loaded machine may need


class LostRank(RunError):
    """The ranks can no longer communicate. Raised on every rank; only a hard exit is safe then."""


def join(world: World, device: torch.device, *, timeout: float) -> "Roster":
    """Meet the other ranks and make torch's process group. Raises as `Roster`."""
    roster = Roster(world, timeout=timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", roster.store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout),
    )
    return roster


@contextmanager
def joined(world: World, device: torch.device, *, timeout: float) -> Iterator[None]:
    """Around all communication of a command: `join` where there are several ranks, and the end of
    the process group. Raises as `Roster`."""
    several = world.size > 1
    try:
        with join(world, device, timeout=timeout) if several else nullcontext():
            yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Roster:
    """The connected ranks of one job; a context manager around all communication.

    Inside, an error of the transport becomes LostRank with one sentence, and any other error is
    reported to the other ranks. If a collective does not return at all (NCCL can hang), a thread
    ends the process soon after `timeout`.

    Args:
        world: this rank. timeout: seconds to wait for the others, here and in a collective.

    Raises:
        ConfigError: the port is taken. LostRank: some rank did not come within `timeout`.
    """

    def __init__(self, world: World, *, timeout: float) -> None:
        self.world, self.timeout = world, timeout
        self._interval = min(2.0, timeout / 10)
        self._agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._job = "job"  # before every key
        shared = self._open()
        if self._agent:
            self._job = self._name(shared)
        self.store = dist.PrefixStore(self._job, shared)
        self.hosts = self._meet(shared)
        self._heartbeats = dist.PrefixStore(self._job, self._connect(timeout))
        self._last_contact = time.monotonic()
        self._verdict = ""
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True, name=work.__name__)
            for work in (self._beat, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def _connect(self, timeout: float, *, is_master: bool = False) -> dist.TCPStore:
        return dist.TCPStore(
            self.world.master_addr,
            self.world.master_port,
            is_master=is_master,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )

    def _open(self) -> dist.TCPStore:
        world = self.world
        is_master = world.rank == 0 and not self._agent
        try:
            if not is_master:
                self._await_store()
            return self._connect(self.timeout, is_master=is_master)
        except RuntimeError as error:
            if is_master and ("EADDRINUSE" in str(error) or "already in use" in str(error)):
                raise ConfigError(
                    f"the master port must be free, got {world.master_port}, which another process "
                    f"on {socket.gethostname()} has; export another MASTER_PORT."
                ) from None
            raise LostRank(
                f"rank {world.rank} on {socket.gethostname()} cannot reach rank 0 at "
                f"{world.master_addr}:{world.master_port} within {self.timeout:g} s; see that rank "
                f"0 started, the name resolves and no firewall is between."
            ) from None

    def _await_store(self) -> None:
        """Wait until rank 0 listens. (The store's own waiting prints many errors.)"""
        end = time.monotonic() + self.timeout
        while True:
            try:
                address = self.world.master_addr, self.world.master_port
                socket.create_connection(address, timeout=self.timeout).close()
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise RuntimeError(f"no answer: {error}") from None
                time.sleep(0.1)

    def _name(self, shared: dist.TCPStore) -> str:
        """A name of this start of the job, from the current rank 0.

        torchrun's agent has one store for all restarts, with the keys of earlier starts in it. Its
        number of restarts is no such name: an agent counts failures of its own ranks only.
        """
        mine = secrets.token_hex(8)
        if self.world.rank == 0:
            return mine
        number = shared.add("asked", 1)
        shared.set(f"ask/{number}", mine)
        try:
            shared.wait([f"answer/{mine}"], timedelta(seconds=self.timeout))
            return shared.get(f"answer/{mine}").decode()
        except RuntimeError:
            raise self._not_met("rank 0") from None

    def _answer(self, shared: dist.TCPStore, keys: list[str]) -> bool:
        """Rank 0 answers requests for the name of this start, until all ranks have come; False if
        they do not in time."""
        done: set[int] = set()
        end = time.monotonic() + self.timeout
        while not self.store.check(keys):
            if time.monotonic() > end:
                return False
            for number in {*range(1, shared.add("asked", 0) + 1)} - done:
                if shared.check([f"ask/{number}"]):
                    shared.set(f"answer/{shared.get(f'ask/{number}').decode()}", self._job)
                    done.add(number)
            time.sleep(0.02)
        return True

    def _meet(self, shared: dist.TCPStore) -> list[str]:
        """Host names in the order of ranks."""
        world = self.world
        keys = [f"host/{r}" for r in range(world.size)]
        self.store.set(f"beat/{world.rank}", "0")
        self.store.set(keys[world.rank], socket.gethostname())
        try:
            come = True
            if self._agent and world.rank == 0:
                come = self._answer(shared, keys)
            else:
                self.store.wait(keys, timedelta(seconds=self.timeout))
            if come:
                return [self.store.get(key).decode() for key in keys]
        except RuntimeError:
            pass
        missing = "rank 0"
        try:
            gone = [r for r, key in enumerate(keys) if not self.store.check([key])]
            missing = f"{len(gone)} of them, first rank {gone[0]}," if gone else missing
        except RuntimeError:
            pass
        raise self._not_met(missing)

    def _not_met(self, missing: str) -> LostRank:
        return LostRank(
            f"{self.world.size} ranks must meet, but {missing} did not come within "
            f"{self.timeout:g} s; read its own message, or start as many as "
            f"{self.world.launcher} was told."
        )

    # Two threads: one communicates and may block, the other only checks the time.

    def _beat(self) -> None:
        count = 0
        last: dict[int, tuple[bytes, float]] = {}  # rank -> its heartbeat and when it changed
        try:
            while not self._stopped.wait(self._interval):
                count += 1
                self._heartbeats.set(f"beat/{self.world.rank}", str(count))
                if self.world.rank == 0:
                    self._find_silent(last)
                if self._heartbeats.check(["verdict"]):
                    self._verdict = self._heartbeats.get("verdict").decode()
                self._last_contact = time.monotonic()
        except RuntimeError:
            pass  # `_last_contact` no longer changes

    def _find_silent(self, last: dict[int, tuple[bytes, float]]) -> None:
        """On rank 0: write the verdict if a rank has sent no heartbeat for `timeout`."""
        now = time.monotonic()
        keys = [f"beat/{r}" for r in range(self.world.size)]
        for rank, beat in enumerate(self._heartbeats.multi_get(keys)):
            if rank not in last or last[rank][0] != beat:
                last[rank] = beat, now
        silent = [r for r, (_, when) in last.items() if now - when > self.timeout]
        if silent and not self._verdict:
            self._heartbeats.set("verdict", self._named(silent))

    def _watch(self) -> None:
        """End this process if its collective should have raised and did not."""
        grace = 4 * _GRACE + 4 * self._interval
        since = 0.0
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            since = since or (now if self._verdict else 0.0)
            alone = now - self._last_contact > self.timeout + grace
            if alone or (since and now - since > grace):
                print(f"error: {self._verdict or self._no_store()}", file=sys.stderr, flush=True)
                os._exit(1)

    # After an error.

    def __enter__(self) -> "Roster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or self.world.size == 1:
            self._leave()
            return
        text = str(error)
        of_transport = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and any(part in text for part in _CONNECTION_ERRORS)
        )
        reason = "" if of_transport else f"{type(error).__name__}: {text.strip().splitlines()[:1]}"
        causes: list[str] = []
        thread = threading.Thread(target=self._find_cause, args=(reason, causes), daemon=True)
        thread.start()
        thread.join(4 * _GRACE + 3 * self._interval)
        self._leave()
        if of_transport:
            first = text.strip().splitlines()[0]
            raise LostRank(causes[0] if causes else self._verdict or self._no_store()) from (
                RuntimeError(first)
            )

    def _leave(self) -> None:
        """End the threads: Python aborts at exit if one is inside the store's C++ then."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(_GRACE)

    def _find_cause(self, reason: str, causes: list[str]) -> None:
        """Report this rank's error, append the cause on other ranks, and wait for their reports."""
        try:
            store = dist.PrefixStore(self._job, self._connect(_GRACE))
            store.set(f"ended/{self.world.rank}", reason or "wire")
            beats = [f"beat/{r}" for r in range(self.world.size)]
            before = store.multi_get(beats)
            time.sleep(max(_GRACE, 3 * self._interval))
            after = store.multi_get(beats)
            reports = self._reports(store)
            lost = [r for r in range(self.world.size) if before[r] == after[r] and r not in reports]
            errors = [(r, report) for r, report in reports.items() if report != "wire"]
            if lost:
                causes.append(self._named(lost))
            elif errors:
                rank, report = errors[0]
                causes.append(f"rank {rank} on {self.hosts[rank]} failed: {report}")
            else:
                causes.append(
                    f"a collective did not end within {self.timeout:g} s though all ranks live; "
                    f"raise --timeout if one of them is only slow."
                )
            end = time.monotonic() + _GRACE
            while len(self._reports(store)) + len(lost) < self.world.size:
                if time.monotonic() > end:
                    break
                time.sleep(0.2)
            if self.world.rank == 0:
                time.sleep(1.0)  # the store ends with this process
        except RuntimeError:
            pass  # the store or this host's network is gone

    def _reports(self, store: dist.Store) -> dict[int, str]:
        """rank -> its error, or "wire" for one of the transport; ranks that have ended."""
        keys = {r: f"ended/{r}" for r in range(self.world.size)}
        return {r: store.get(key).decode() for r, key in keys.items() if store.check([key])}

    def _named(self, ranks: list[int]) -> str:
        hosts = sorted({self.hosts[r] for r in ranks})
        names = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        return (
            f"lost rank {names} on {', '.join(hosts[:8])}: the process died or the network to it "
            f"is cut; start again with --resume auto."
        )

    def _no_store(self) -> str:
        here, there = socket.gethostname(), self.hosts[0]
        if self.world.rank == 0:
            return f"rank 0 on {here} lost the other ranks; start again with --resume auto."
        return (
            f"rank {self.world.rank} on {here} lost rank 0 on {there}: that process died, or the "
            f"network between the two is cut; start again with --resume auto."
        )
