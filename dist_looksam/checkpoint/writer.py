"""Writes checkpoints: training waits for a copy to host memory, then a thread per rank writes it.

No collective runs in a thread. A save has three stages:

    save      every rank copies its pieces and starts its thread
    written   a thread's part and its JSON are on the disk; the caller's ranks exchange this flag
    commit    rank 0 reads the JSON of all parts, writes the manifest, renames, deletes old ones

`wait` completes the remaining stages.
"""

import contextlib
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends.backend import Backend
from ..engine import Engine
from ..errors import ConfigError, RunError
from .form import FORMAT, MANIFEST, part_name, read_json, sync_folder, write_json, write_tensors
from .module import aliases, extra_states, unlayered
from .reader import found
from .restore import check_engine
from .values import pack, packable

PATIENCE = 120.0  # seconds until a shared file system shows rank 0 the files of other ranks
_LEFTOVER = re.compile(r"\.step-\d+\.\w+\.(writing|deleting)")
_LIBRARIES = ("torch", "deepspeed", "horovod", "timm", "safetensors")


@dataclass
class _Job:
    """A save that is not committed yet."""

    step: int
    scratch: Path
    manifest: dict[str, Any]
    writing: threading.Thread
    committing: threading.Thread | None = None


class Writer:
    """Saves a run's checkpoints. Methods marked collective are called by all ranks together.

    Args:
        engine: whose state is saved; or its backend, without the number of passes.
        folder: checkpoints/ of the run, on a file system that all ranks share.
        keep: number of newest checkpoints to keep, the last written always among them; 0 keeps all.
        background: False makes `save` return when the checkpoint is committed.

    Raises:
        ConfigError: the base optimizer has state outside its state_dict's "state", or `keep` is out
            of range.
    """

    def __init__(
        self,
        engine: Engine | Backend,
        folder: str | Path,
        *,
        keep: int = 0,
        background: bool = True,
    ) -> None:
        self._engine = engine if isinstance(engine, Engine) else None
        backend = engine.backend if isinstance(engine, Engine) else engine
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
            raise ConfigError(
                f"keep must be a whole number >= 0, got {keep!r}. 0 keeps all checkpoints."
            )
        _check_base(backend.optimizer.base_optimizer)
        self.backend, self.folder, self.keep = backend, Path(folder), keep
        self.background = background
        self._job: _Job | None = None
        self._error: str | None = None
        self._unchecked = True  # until a first save has shown that all state can be written
        self._host: dict[str, Tensor] = {}
        # Before the gather: after it, another rank may have begun to write.
        if backend.rank == 0:
            for path in self.folder.iterdir() if self.folder.is_dir() else ():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
        # Ranks write to the same folder, and never to that of a killed run.
        self._token = backend.gather(secrets.token_hex(4))[0]

    # For the caller between steps; nothing here waits.

    @property
    def pending(self) -> int | None:
        """The step of the save that is not committed; the same on every rank."""
        return None if self._job is None else self._job.step

    @property
    def written(self) -> bool:
        """Whether this rank has no part to write."""
        return self._job is None or not self._job.writing.is_alive()

    @property
    def failed(self) -> bool:
        """Whether this rank could not write; `wait` raises the reason on all ranks."""
        return self._error is not None

    def commit(self, step: int) -> None:
        """Call it when all ranks have `written` their parts of `step`: rank 0 commits it."""
        if self._job is None or self._job.step != step or self._job.committing is not None:
            return
        if self.backend.rank == 0:
            self._job.committing = self._start(self._commit, self._job)
        else:
            self._job.committing = self._job.writing  # this rank has no more to do

    # Collective.

    def save(self, step: int, extra: dict[str, Any]) -> None:
        """Begin to write step-`step`. Waits for the save before this one. Collective.

        Args:
            extra: settings and other JSON for `Reader.extra`.

        Raises:
            RunError: this or the save before cannot be written.
            ConfigError: on every rank, there is state that no checkpoint can hold.
        """
        self.wait()
        state, values = self._state()
        tensors, part = self._copy(values)
        scratch = self.folder / f".step-{step}.{self._token}.writing"
        manifest = {
            "format": FORMAT,
            "step": step,
            "ranks": self.backend.size,
            "backend": self.backend.name,
            "versions": _versions(),
            "aliases": aliases(self.backend.module),
            "shapes": {p.name: list(p.shape) for p in self.backend.pieces()},
            **state,
            "passes": None if self._engine is None else self._engine.passes,
            "extra": extra,
        }
        writing = self._start(self._write, scratch, tensors, part)
        self._job = _Job(step, scratch, manifest, writing)
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """The last save is committed when this returns. Collective.

        Raises:
            RunError: on every rank, the error of one.
        """
        job = self._job
        if job is None:
            return
        job.writing.join()
        self._agree(job)
        if self.backend.rank == 0:
            if job.committing is None:
                self._guarded(self._commit, job)
            else:
                job.committing.join()
        self._agree(job)
        self._job = None

    def close(self) -> None:
        """After an error: wait up to a minute for this rank's part. Not collective."""
        if self._job is not None:
            for thread in (self._job.writing, self._job.committing):
                if thread is not None:
                    thread.join(timeout=60.0)

    def _agree(self, job: _Job) -> None:
        problems = [p for p in self.backend.gather(self._error) if p]
        if not problems:
            return
        self._job, self._error = None, None
        if self.backend.rank == 0:
            shutil.rmtree(job.scratch, ignore_errors=True)
        whole = found(self.folder)
        older = f"the newest whole one is {whole[0]}" if whole else "there is none before it"
        raise RunError(f"checkpoint step-{job.step} was not written: {problems[0]}; {older}.")

    # The copy that training waits for.

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """("counters" and "extra_states" as JSON, tensors in them by name). ConfigError on all
        ranks if one has state that no checkpoint can hold."""
        tensors: dict[str, Tensor] = {}
        state, problem = {}, None
        try:
            counters, states = self.backend.counters(), extra_states(self.backend.module)
            for group in counters["groups"]:  # settings such as functions are left out
                group["settings"] = {k: v for k, v in group["settings"].items() if packable(v)}
            state["counters"] = pack(counters, "counters", tensors)
            state["extra_states"] = pack(states, "extra_states", tensors)
        except ConfigError as error:
            problem = str(error)
        if self._unchecked or problem:
            for sentence in filter(None, self.backend.gather(problem)):
                raise ConfigError(sentence)
            self._unchecked = False
        return state, tensors

    def _copy(self, values: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors in host memory, the part's JSON). Rank 0 writes `values`."""
        values = values if self.backend.rank == 0 else {}
        tensors = {f"value/{name}": value for name, value in values.items()}
        pieces: list[tuple[str, str, int, int]] = []
        for layer, key, start, entries in slices(self.backend):
            tensors[f"{key}/{start}/{layer}"] = entries.detach()
            pieces.append((layer, key, start, start + entries.numel()))
        buffers = [
            (name, tensor)
            for name, (tensor, own) in unlayered(self.backend).items()
            if own or self.backend.rank == 0
        ]
        tensors |= {f"buffer/{name}": tensor for name, tensor in buffers}
        part = {
            "file": part_name(self.backend.rank),
            "pieces": pieces,
            "buffers": [name for name, _ in buffers],
            "values": list(values),
        }
        # The memory is reused by the next save: new pages would cost as much as the copy.
        self._host = {name: self._into_host(name, t) for name, t in tensors.items()}
        if any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()
        return self._host, part

    def _into_host(self, name: str, tensor: Tensor) -> Tensor:
        held = self._host.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return held.copy_(tensor, non_blocking=True)

    # In threads. Nothing here may call the backend's collectives.

    def _start(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=self._guarded, args=(work, *arguments), daemon=True)
        thread.start()
        return thread

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except OSError as error:
            self._error = f"{error.strerror or error} ({error.filename or self.folder})"
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"

    def _write(self, scratch: Path, tensors: dict[str, Tensor], part: dict[str, Any]) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        path = scratch / f"{part['file']}.safetensors"
        try:
            part["sha256"], part["bytes"] = write_tensors(path, tensors)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()  # gives the space back
            raise OSError(error.errno, error.strerror, str(path)) from error
        write_json(path.with_suffix(".json"), part)
        sync_folder(scratch)

    def _commit(self, job: _Job) -> None:
        job.writing.join()
        parts = [_awaited(job.scratch / f"{part_name(r)}.json") for r in range(self.backend.size)]
        write_json(job.scratch / MANIFEST, {**job.manifest, "parts": parts})
        sync_folder(job.scratch)
        final = self.folder / f"step-{job.step}"
        if final.exists():
            self._delete(final)
        os.rename(job.scratch, final)
        sync_folder(self.folder)
        # A run that went back leaves later steps in the folder: this one stays nevertheless.
        others = [path for path in found(self.folder) if path != final]
        for old in others[self.keep - 1 :] if self.keep else ():
            self._delete(old)

    def _delete(self, path: Path) -> None:
        """Rename it before, so that step-N is never incomplete."""
        renamed = path.with_name(f".{path.name}.{self._token}.deleting")
        os.rename(path, renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def save(
    engine: Engine, folder: str | Path, extra: dict[str, Any] | None = None, *, keep: int = 0
) -> Path:
    """Write a checkpoint of an engine and wait until it is committed. Collective.

    Args:
        folder: for step-N, N the engine's number of steps; on a file system that all ranks share.
        extra: JSON for `restore(...).extra`.
        keep: number of newest checkpoints to keep, this one always among them; 0 keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError: the optimizer has state that no checkpoint can hold.
        RunError: it cannot be written.
    """
    check_engine(engine)
    if extra is not None and not isinstance(extra, dict):
        raise ConfigError(f"extra must be a dictionary, got a {type(extra).__name__}.")
    step = engine.optimizer.steps
    writer = Writer(engine, folder, keep=keep)
    writer.save(step, extra or {})
    writer.wait()
    return Path(folder) / f"step-{step}"


def _check_base(base: Optimizer) -> None:
    beside: set[str] = set()
    if hasattr(base, "consolidate_state_dict"):
        beside = {"state on other ranks"}
    elif type(base).state_dict is not Optimizer.state_dict:
        beside = base.state_dict().keys() - {"state", "param_groups"}
    if beside:
        raise ConfigError(
            f"a checkpoint holds an optimizer's state and param_groups, got base "
            f"{type(base).__name__} with {', '.join(sorted(beside))} besides; use another base."
        )


def slices(backend: Backend) -> list[tuple[str, str, int, Tensor]]:
    """(layer, key, start, flat tensor) of all that this rank writes.

    Ranks that hold the same piece write a share of it each, so that every entry is written once.
    """
    num_replicas, replica = backend.replicas
    written = []
    for piece, slots in zip(backend.pieces(), backend.slots(), strict=True):
        length = piece.stop - piece.start
        low, high = (length * n // num_replicas for n in (replica, replica + 1))
        if low < high:
            written += [(piece.name, k, piece.start + low, v[low:high]) for k, v in slots.items()]
    return written


def _awaited(path: Path) -> dict[str, Any]:
    """A part's JSON, which exists but may appear late on a shared file system."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            os.listdir(path.parent)  # makes NFS refresh the folder
            return read_json(path)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise OSError(
                    None, f"not seen for {PATIENCE:.0f} s, is --out shared by all ranks?", str(path)
                ) from None
            time.sleep(0.05)


def _versions() -> dict[str, str]:
    loaded = {name: sys.modules.get(name) for name in _LIBRARIES}
    return {name: str(getattr(m, "__version__", "?")) for name, m in loaded.items() if m}
