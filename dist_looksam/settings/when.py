"""When a run looks and mixes, and how far: shares of a run as steps, rho's factor at a step."""

from typing import Any

from ..errors import ConfigError
from ..maths.schedule import rho_factor

# Part of the flags' help.
MOMENT = ": a share of the run with a decimal point (0.9, 1.0), else a number of steps (900, 1)"


def known(s: Any) -> dict[str, Any]:
    """look_from and look_until of a rule; a share counts only once its run's length is known."""
    first, until = s.look_from, s.look_until
    return {
        "look_from": 0 if isinstance(first, float) else first,
        "look_until": None if isinstance(until, float) else until,
    }


def step_of(moment: int | float | None, steps: int) -> int | None:
    """A share of the run (a float) as a step, rounded; a step (an int) and None as they are."""
    return round(moment * steps) if isinstance(moment, float) else moment


def share_of_run(look_from: int | float, look_until: int | float | None) -> float:
    """About how much of a run of unknown length lies between two moments: steps count as none."""
    end = look_until if isinstance(look_until, float) else 1.0
    return max(0.0, end - (look_from if isinstance(look_from, float) else 0.0))


def check(s: Any) -> None:
    """ConfigError for settings that contradict each other in runs of any length."""
    first, until = s.look_from, s.look_until
    moments = {"look_from": first, "look_until": until, "mixup_until": s.mixup_until}
    for name, moment in moments.items():
        if isinstance(moment, float) and not 0 <= moment <= 1:
            raise ConfigError(
                f"{name} must be a share of the run in [0.0, 1.0] or a whole number of steps, got "
                f"{moment}; 0.9 is nine tenths of the run, 900 is step 900."
            )
    if isinstance(first, float) and isinstance(until, float) and first >= until:
        raise ConfigError(
            f"look_from must be before look_until, got {first} and {until}, between which no step "
            f"can look; lower --look_from, or leave --look_until out."
        )
    if s.rho_end is not None and s.rho_schedule == "constant":
        raise ConfigError(
            f"rho_end needs a schedule that ends there, got {s.rho_end:g} with rho_schedule "
            f"constant; use --rho_schedule linear, cosine or lr, or leave --rho_end out."
        )


def window(s: Any, steps: int) -> dict[str, Any]:
    """look_from and look_until in steps, for a run of so many steps.

    Raises:
        ConfigError: no step between them is in the run, or rho's warm-up does not end there.
    """
    first, until = step_of(s.look_from, steps), step_of(s.look_until, steps)
    found = {"look_from": first, "look_until": until}
    if s.rule.ascent is None:
        return found
    assert first is not None
    end = steps if until is None else min(until, steps)
    if first >= end:
        raise ConfigError(
            f"look_from must be before look_until and the end of the run's {steps} steps, got step "
            f"{first} and step {end}, between which no step can look; lower --look_from, or train "
            f"without looks by --optimizer {s.base or 'adamw'}."
        )
    if s.rho_warmup_steps >= end - first and s.rho_warmup_steps:
        raise ConfigError(
            f"rho_warmup_steps must be fewer than the {end - first} steps in which looks may be, "
            f"got {s.rho_warmup_steps}; lower it."
        )
    return found


def rho_scale(s: Any, step: int, *, lr: float) -> float:
    """The factor of rho at a step of resolved settings. lr: learning rate / its peak."""
    return rho_factor(
        step,
        first=s.look_from,
        steps=s.steps,
        warmup=s.rho_warmup_steps,
        schedule=s.rho_schedule,
        end=s.rho_end or 0.0,
        lr=lr,
    )


def looks_text(s: Any) -> str:
    """How many looks a run of resolved settings has, and at which steps."""
    rule, steps = s.rule, s.steps
    count = rule.num_looks(steps)
    if not count:
        return "none"
    first, end = rule.look_from, rule.look_from + rule.num_in_window(steps)
    if rule.looks == "adaptive":
        return f"about {count:,}, adaptive, between step {first:,} and step {end - 1:,}"
    last = first + (count - 1) * rule.k
    each = "every step" if rule.k == 1 else f"every {rule.k} steps"
    if count == 1:
        return f"1, at step {first:,}"
    return f"{count:,}, {each} from step {first:,} to step {last:,}"


def rho_text(s: Any) -> str:
    """The schedule of rho of resolved settings."""
    end = s.rho_end or 0.0
    text = {
        "constant": "constant",
        "lr": f"with the learning rate, from {s.rho:g} at its peak to {end * s.rho:g} at lr 0",
    }.get(
        s.rho_schedule,
        f"{s.rho_schedule}, from {s.rho:g} at step {s.look_from:,} to {end * s.rho:g} at the end",
    )
    if s.rho_warmup_steps:
        text += f"; times a warm-up of {s.rho_warmup_steps:,} steps from step {s.look_from:,}"
    return text
