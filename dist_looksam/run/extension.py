"""A run that is made longer at a resume: the learning rate from there on.

Without --extend it is that of the longer schedule, as if the run had had it from the beginning.
With --extend it goes on from its value at the checkpoint, and decays to the new end. Where it went
on is kept in checkpoints, so that a resumed extended run has the same rates. rho's own schedule and
shares of the run, such as --look_from 0.9, are those of the longer run in both cases.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from .. import checkpoint
from ..errors import ConfigError
from ..maths.schedule import extended_factor, factor
from ..settings import when
from ..settings.config import Settings

KEY = "extension"  # in a checkpoint's `extra`: (first step, factor of lr there), or null
LEAST = 0.01  # factor of lr under which more steps would change nothing worth mentioning

Extension = tuple[int, float]


def lr_factor(step: int, settings: Mapping[str, Any], extension: Extension | None) -> float:
    """The factor of the peak learning rate at a step. settings: resolved, by name."""
    steps, schedule = settings["steps"], settings["schedule"]
    if extension is not None and step >= extension[0]:
        first, start = extension
        return extended_factor(step, first=first, start=start, steps=steps, schedule=schedule)
    return factor(step, steps=steps, warmup=settings["warmup_steps"], schedule=schedule)


def _stored(reader: checkpoint.Reader) -> Extension | None:
    found = reader.extra.get(KEY)
    return (int(found[0]), float(found[1])) if found else None


def _before(reader: checkpoint.Reader) -> float | None:
    """The factor of lr at the checkpoint's step, as its run would have had it; None if unknown."""
    try:
        return lr_factor(reader.step, reader.extra["settings"], _stored(reader))
    except (KeyError, TypeError, ZeroDivisionError):  # of an older version; at its very end
        return None


def of(settings: Settings, reader: checkpoint.Reader | None) -> Extension | None:
    """Where the run is extended. settings: resolved and checked."""
    if reader is None:
        return None
    stored, then = _stored(reader), reader.extra["settings"].get("steps")
    if then == settings.steps:
        return stored
    start = _before(reader)
    return (reader.step, start) if settings.extend and start is not None else None


def check(settings: Settings, reader: checkpoint.Reader | None) -> None:
    """ConfigError if --extend cannot be done. reader: of the checkpoint to resume; None for none.
    settings: resolved."""
    if not settings.extend:
        return
    if reader is None:
        raise ConfigError(
            f"extend needs a checkpoint to go on from, got none in {settings.out}; name a run with "
            f"--resume RUN, or leave --extend out."
        )
    then, start = reader.extra["settings"].get("steps"), _before(reader)
    if then == settings.steps and _stored(reader) is not None:
        return
    assert settings.steps is not None
    if then is None or start is None or settings.steps <= then:
        raise ConfigError(
            f"extend needs more steps than the {then} of the run of {reader.path}, got "
            f"{settings.steps}; use more --steps, or leave --extend out."
        )
    if reader.step < (reader.extra["settings"].get("warmup_steps") or 0):
        raise ConfigError(
            f"extend needs a checkpoint from after the warm-up, got {reader.path} of step "
            f"{reader.step}; leave --extend out."
        )
    if start < LEAST:
        raise ConfigError(
            f"extend goes on with the learning rate of the checkpoint, which must be at least "
            f"{LEAST:.0%} of its peak, got {start:.2%} in {reader.path}; resume an earlier "
            f"checkpoint, or leave --extend out for the schedule of {settings.steps} steps."
        )


def notes(reader: checkpoint.Reader, now: dict[str, Any]) -> list[str]:
    """What happens to the learning rate where the run's length has changed. now: the settings."""
    then, before = reader.extra["settings"], _before(reader)
    if then.get("steps") == now["steps"] or before is None:
        return []
    if now["extend"]:
        how = "stays" if now["schedule"] == "constant" else f"falls ({now['schedule']}) to 0"
        return [
            f"extended from {then['steps']} to {now['steps']} steps: from step {reader.step} on lr "
            f"{how}, from {before:.1%} of its peak",
            *_rho_note(reader.step, then, now),
        ]
    after = lr_factor(reader.step, now, None)
    if abs(after - before) < 1e-9:
        return _rho_note(reader.step, then, now)
    return [
        f"warning: the schedule is that of {now['steps']} steps: lr goes on at {after:.1%} of its "
        f"peak at step {reader.step}, where that of {then['steps']} steps has {before:.1%}; "
        f"--extend goes on at that",
        *_rho_note(reader.step, then, now),
    ]


def _rho_note(step: int, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A warning where rho, whose own schedule --extend does not change, jumps."""
    try:
        was, is_now = (when.rho_scale(SimpleNamespace(**s), step, lr=1.0) for s in (then, now))
    except (AttributeError, TypeError):  # of an older version
        return []
    if abs(is_now - was) < 1e-9:
        return []
    return [
        f"warning: the schedule of rho is that of {now['steps']} steps: at step {step} its factor "
        f"is {is_now:.3g}, where that of {then['steps']} steps has {was:.3g}"
    ]
