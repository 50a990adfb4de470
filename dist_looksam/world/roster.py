"""Who takes part, on which host, and who was lost.

Every rank *beats*: it counts up a key of the job's store, which rank 0 (under torchrun: its agent)
keeps. A rank is *lost* when it stopped beating without a word. gloo and NCCL only know that a
neighbour is silent, and the neighbour may just be waiting for the rank that is gone.
"""

import os
import secrets
import socket
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from dist_looksam.errors import ConfigError, RunError
from dist_looksam.world.launchers import World

# What gloo and the store say when a peer is gone; NCCL's errors have a class of their own.
_WIRE = (
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "Connection timed out",
    "Connect timeout",
    "Timed out",
    "Socket Timeout",
    "Broken pipe",
    "connectFullMesh",
)
_BLINK = 3.0  # seconds without a beat that a loaded machine may need


class LostRank(RunError):
    """The ranks cannot talk any more. Every rank says so; only a hard exit is safe after it."""


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


class Roster:
    """The ranks of one job, met; a context manager around all that communicates.

    Inside, an error of the transport becomes LostRank with one sentence, and another error is told
    to the other ranks. A rank whose collective does not return at all (NCCL can hang) is ended from
    a thread, soon after `timeout`.

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
        self._line = dist.PrefixStore(self._job, self._connect(timeout))
        self._heard = time.monotonic()
        self._verdict = ""
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True, name=work.__name__)
            for work in (self._beat, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def _connect(self, timeout: float, *, keeper: bool = False) -> dist.TCPStore:
        return dist.TCPStore(
            self.world.master_addr,
            self.world.master_port,
            is_master=keeper,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )

    def _open(self) -> dist.TCPStore:
        world = self.world
        keeper = world.rank == 0 and not self._agent
        try:
            if not keeper:
                self._await_keeper()
            return self._connect(self.timeout, keeper=keeper)
        except RuntimeError as error:
            if keeper and ("EADDRINUSE" in str(error) or "already in use" in str(error)):
                raise ConfigError(
                    f"the master port must be free, got {world.master_port}, which another process "
                    f"on {socket.gethostname()} has; export another MASTER_PORT."
                ) from None
            raise LostRank(
                f"rank {world.rank} on {socket.gethostname()} cannot reach rank 0 at "
                f"{world.master_addr}:{world.master_port} within {self.timeout:g} s; see that rank "
                f"0 started, the name resolves and no firewall is between."
            ) from None

    def _await_keeper(self) -> None:
        """Until rank 0 listens. (The store's own waiting fills the screen when it is in vain.)"""
        end = time.monotonic() + self.timeout
        while True:
            try:
                where = self.world.master_addr, self.world.master_port
                socket.create_connection(where, timeout=self.timeout).close()
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise RuntimeError(f"no answer: {error}") from None
                time.sleep(0.1)

    def _name(self, shared: dist.TCPStore) -> str:
        """A name of this start of the job, from the rank 0 that lives now.

        torchrun's agent keeps one store for all restarts, so keys of the last start are there. Its
        count of them is no name: an agent counts failures of its own ranks only.
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

    def _answer(self, shared: dist.TCPStore, keys: list[str]) -> None:
        """Rank 0 tells all who ask the name of this start, until all have come."""
        done: set[int] = set()
        end = time.monotonic() + self.timeout
        while not self.store.check(keys) and time.monotonic() < end:
            for number in {*range(1, shared.add("asked", 0) + 1)} - done:
                if shared.check([f"ask/{number}"]):
                    shared.set(f"answer/{shared.get(f'ask/{number}').decode()}", self._job)
                    done.add(number)
            time.sleep(0.02)

    def _meet(self, shared: dist.TCPStore) -> list[str]:
        """Host names in the order of ranks."""
        world = self.world
        keys = [f"host/{r}" for r in range(world.size)]
        self.store.set(f"beat/{world.rank}", "0")
        self.store.set(keys[world.rank], socket.gethostname())
        try:
            left = self.timeout
            if self._agent and world.rank == 0:
                self._answer(shared, keys)
                left = 0.01
            self.store.wait(keys, timedelta(seconds=left))
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

    # Two threads: one talks and may be stuck in the talking, one only looks at the clock.

    def _beat(self) -> None:
        count = 0
        seen: dict[int, tuple[bytes, float]] = {}
        try:
            while not self._over.wait(self._interval):
                count += 1
                self._line.set(f"beat/{self.world.rank}", str(count))
                if self.world.rank == 0:
                    self._judge(seen)
                if self._line.check(["verdict"]):
                    self._verdict = self._line.get("verdict").decode()
                self._heard = time.monotonic()
        except RuntimeError:
            pass  # `_heard` stands still from now on

    def _judge(self, seen: dict[int, tuple[bytes, float]]) -> None:
        """Rank 0 tells all when a rank has been silent for the whole time-out."""
        now = time.monotonic()
        keys = [f"beat/{r}" for r in range(self.world.size)]
        for rank, beat in enumerate(self._line.multi_get(keys)):
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = beat, now
        silent = [r for r, (_, when) in seen.items() if now - when > self.timeout]
        if silent and not self._verdict:
            self._line.set("verdict", self._named(silent))

    def _watch(self) -> None:
        """End this process where its collective ought to have raised, and did not."""
        grace = 4 * _BLINK + 4 * self._interval
        judged = 0.0
        while not self._over.wait(self._interval):
            now = time.monotonic()
            judged = judged or (now if self._verdict else 0.0)
            alone = now - self._heard > self.timeout + grace
            if alone or (judged and now - judged > grace):
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
        wire = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and any(words in text for words in _WIRE)
        )
        reason = "" if wire else f"{type(error).__name__}: {text.strip().splitlines()[:1]}"
        found: list[str] = []
        asking = threading.Thread(target=self._ask, args=(reason, found), daemon=True)
        asking.start()
        asking.join(4 * _BLINK + 3 * self._interval)
        self._leave()
        if wire:
            first = text.strip().splitlines()[0]
            raise LostRank(found[0] if found else self._verdict or self._no_store()) from (
                RuntimeError(first)
            )

    def _leave(self) -> None:
        """Python aborts at its end where a thread is inside the store's C++ then."""
        self._over.set()
        for thread in self._threads:
            thread.join(_BLINK)

    def _ask(self, reason: str, found: list[str]) -> None:
        """Leave a word in the store, see who is silent without one, and wait for the others."""
        try:
            line = dist.PrefixStore(self._job, self._connect(_BLINK))
            line.set(f"ended/{self.world.rank}", reason or "wire")
            beats = [f"beat/{r}" for r in range(self.world.size)]
            before = line.multi_get(beats)
            time.sleep(max(_BLINK, 3 * self._interval))
            after = line.multi_get(beats)
            words = self._words(line)
            lost = [r for r in range(self.world.size) if before[r] == after[r] and r not in words]
            causes = [(r, word) for r, word in words.items() if word != "wire"]
            if lost:
                found.append(self._named(lost))
            elif causes:
                rank, word = causes[0]
                found.append(f"rank {rank} on {self.hosts[rank]} failed: {word}")
            else:
                found.append(
                    f"a collective did not end within {self.timeout:g} s though all ranks live; "
                    f"raise --timeout if one of them is only slow."
                )
            end = time.monotonic() + _BLINK
            while len(self._words(line)) + len(lost) < self.world.size and time.monotonic() < end:
                time.sleep(0.2)
            if self.world.rank == 0:
                time.sleep(1.0)  # the store goes with this process
        except RuntimeError:
            pass  # the store is gone, or this host's network is

    def _words(self, line: dist.Store) -> dict[int, str]:
        keys = {r: f"ended/{r}" for r in range(self.world.size)}
        return {r: line.get(key).decode() for r, key in keys.items() if line.check([key])}

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
