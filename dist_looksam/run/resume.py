"""Chooses the checkpoint to resume from, and compares it with the run's settings."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import checkpoint, models
from ..backends.backend import Backend
from ..data import Data
from ..data.augment import parse
from ..data.blocks import FULL
from ..data.extent import Extent
from ..data.fingerprint import fingerprint
from ..data.sets import data_set
from ..errors import ConfigError, RunError
from ..record import rundir
from ..settings.config import Settings
from . import extension

Result = TypeVar("Result")
# A resumed run must have the same values, else it would not continue the run of the checkpoint.
MUST_AGREE = (
    "model", "optimizer", "base", "batch_size", "data", "image_size", "train_images", "holdout",
    "seed", "shuffle", "image_size_from", "freeze",
)  # fmt: skip
NOT_OF_THE_RUN = (
    "out", "resume", "init", "requeue", "dry_run", "ranks", "local_rank", "extend",
)  # fmt: skip


def shared(backend: Backend, work: Callable[[], Result]) -> Result:
    """Call work() on rank 0; return its result or raise its error on every rank. One collective."""
    outcome: tuple[str, Any] = ("", None)
    if backend.rank == 0:
        try:
            outcome = ("", work())
        except (ConfigError, RunError) as error:
            outcome = (type(error).__name__, str(error))
    kind, result = backend.gather(outcome)[0]
    if kind:
        raise (ConfigError if kind == "ConfigError" else RunError)(result)
    return result


def saved_settings(settings: Settings, data: Data | Extent) -> dict[str, Any]:
    """The settings as a checkpoint stores them: JSON, with the resolved name of the model."""
    values = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    values["betas"] = list(settings.betas)
    return {**values, "model": models.resolve(settings.model, data.shape)}


def prepare(
    backend: Backend, settings: Settings, data: Data
) -> tuple[checkpoint.Reader | None, list[str]]:
    """Choose and check the checkpoint, make the run directory; returns (reader, notes).

    Collective. Raises:
        ConfigError: no such checkpoint, it is of other settings, or `out` cannot be written.
        RunError: checkpoints are there, but none is whole.
    """
    out = Path(settings.out)
    candidates = shared(backend, lambda: rundir.to_resume(out, settings.resume))
    reader, damaged = checkpoint.choose(backend, candidates)
    if candidates and reader is None:
        raise _none_whole(settings, damaged)
    notes = list(damaged)
    if reader is not None:
        notes += _compare(reader, saved_settings(settings, data))
        notes += _changed_data(reader, data)
        if (ranks := reader.manifest["ranks"]) != backend.size:
            notes.append(f"ranks are {backend.size}, were {ranks} when the checkpoint was written")
    extension.check(settings, reader)
    step, path = (None, None) if reader is None else (reader.step, reader.path)
    notes += shared(backend, lambda: rundir.prepare(out, resume_step=step, resumed=path))
    if reader is not None:
        notes.append(f"resumed from {reader.path} at step {reader.step}")
        rule, after = settings.rule, reader.step - settings.rule.look_from
        lost = rule.reuses_gv and rule.in_window(reader.step) and "g_v" not in reader.keys
        if lost and after % rule.k:
            notes.append("the checkpoint holds no g_v: the first step looks")
    return reader, notes


def outlook(settings: Settings, data: Data | Extent) -> tuple[str, list[str]]:
    """(where a start would begin, its notes), from manifests alone. Writes nothing.

    Raises:
        ConfigError, RunError: as `prepare`, except for errors that only reading or writing shows.
    """
    out = Path(settings.out)
    candidates = rundir.to_resume(out, settings.resume)
    damaged: list[str] = []
    for path in candidates:
        try:
            reader = checkpoint.Reader(path)
        except RunError as error:
            damaged.append(str(error))
            continue
        notes = [*damaged, *_compare(reader, saved_settings(settings, data))]
        extension.check(settings, reader)
        begins = f"at step {reader.step:,}, from {path}, whose contents were not read"
        return begins, notes
    if candidates:
        raise _none_whole(settings, damaged)
    extension.check(settings, None)
    if rundir.used(out):
        return f"anew in {out}; the run that is there gets another name", []
    return f"anew in {out}", []


def _none_whole(settings: Settings, damaged: list[str]) -> RunError:
    advice = f" Remove {Path(settings.out) / 'checkpoints'}, or start anew with --resume none."
    return RunError(" ".join(damaged) + (advice if settings.resume == "auto" else ""))


def _compare(reader: checkpoint.Reader, now: dict[str, Any]) -> list[str]:
    """Notes on settings that changed since the checkpoint. ConfigError for those that must not."""
    then, now = reader.extra.get("settings"), json.loads(json.dumps(now))
    if then is None:
        raise ConfigError(
            f"resume must be a checkpoint that train.py has written, got {reader.path} of another "
            f"program, whose settings are not known; load it there with restore(engine, path), or "
            f"use --resume none."
        )
    # Older ones have no others.
    then = {"shuffle": FULL, "image_size_from": None, "freeze": None, **then}
    for name in MUST_AGREE:
        if name in then and then[name] != now[name]:
            old = then[name]
            use = f"use --{name} {old}" if old is not None else f"leave --{name} out"
            raise ConfigError(
                f"{name} must be as in the checkpoint {reader.path}, got {now[name]} instead of "
                f"{old}; {use}, or --resume none for a new run."
            )
    _compare_repeat(reader, then, now)
    if now["steps"] <= reader.step and then.get("steps", now["steps"]) != now["steps"]:
        raise ConfigError(
            f"steps must be more than the checkpoint's {reader.step}, got {now['steps']}; "
            f"use --steps {then['steps']}."
        )
    notes = [
        f"{name} is {now[name]}, was {then[name]} when the checkpoint was written"
        for name in now
        if name not in NOT_OF_THE_RUN and name in then and then[name] != now[name]
    ]
    if now.get("image_size_from") and then.get("steps") != now["steps"]:
        notes.append(f"warning: images grow over {now['steps']} steps, not {then.get('steps')}")
    notes += extension.notes(reader, now)
    written = reader.manifest["versions"].get("torch")
    if written != str(torch.__version__):
        notes.append(f"torch is {torch.__version__}, was {written} when it was written")
    return notes


def _compare_repeat(reader: checkpoint.Reader, then: dict[str, Any], now: dict[str, Any]) -> None:
    """ConfigError if another repetition of images would change which of them come next."""
    before, after = (
        parse(s.get("augment", "none"), auto=data_set(now["data"]).augment).repeat
        for s in (then, now)
    )
    if before != after:
        use = f"add repeat:{before} to" if before > 1 else "leave repeat out of"
        raise ConfigError(
            f"repeat must be as in the checkpoint {reader.path}, got {after} instead of {before}; "
            f"{use} --augment, or use --resume none for a new run."
        )


def _changed_data(reader: checkpoint.Reader, data: Data) -> list[str]:
    """Warnings about data that changed since the checkpoint."""
    then, now = reader.manifest["extra"].get("data", {}), fingerprint(data)
    return [
        f"warning: the data have changed: {name} is {now[name]}, was {then[name]} when the "
        f"checkpoint was written"
        for name in now
        if then.get(name, now[name]) != now[name]
    ]


def requeue_asked(settings: Settings) -> bool:
    """--requeue, or DIST_LOOKSAM_REQUEUE=1 in a job script."""
    return settings.requeue or os.environ.get("DIST_LOOKSAM_REQUEUE") == "1"
