"""Measured runs grouped by what they trained, seeds together; and the table of them."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..settings.alike import WITHOUT_EFFECT

Measured = dict[str, Any]  # the content of one flatness.json
FORMAT = 1
BITS = (8, 4)  # of the rounded weights
_FITTED = 2.0  # ratio of training losses above which a comparison gets a note
_MOST_NAMED = 4  # settings in the name of a group


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    runs: Sequence[Measured]

    @property
    def method(self) -> str:
        return str(self.runs[0]["optimizer"])

    @property
    def base(self) -> str:
        return str(self.runs[0]["base"])

    def values(self, of: Callable[[Measured], float | None]) -> list[float]:
        """A number of every run that has it."""
        return [v for run in self.runs if (v := of(run)) is not None]

    def text(self, of: Callable[[Measured], float | None], form: str) -> str:
        """Mean ± sample standard deviation; - where no run has the number."""
        values = self.values(of)
        if not values:
            return "-"
        text = f"{statistics.fmean(values):{form}}"
        return text if len(values) == 1 else f"{text} ± {_spread(values, form)}"


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.stdev(values):{form.replace('+', '')}}"


def grouped(measured: Sequence[Measured]) -> list[Group]:
    """Groups in the order of their first runs.

    Runs of one label that differ in other settings than those without effect on the weights are
    different groups; these settings are added to their names.
    """
    by_label: dict[str, list[Measured]] = {}
    for run in measured:
        by_label.setdefault(run["label"], []).append(run)
    groups = []
    for label, runs in by_label.items():
        names = _differing([_kind(run) for run in runs])
        kinds: dict[tuple[str, ...], list[Measured]] = {}
        for run in runs:
            kinds.setdefault(tuple(_text(_kind(run).get(name)) for name in names), []).append(run)
        for values, same in kinds.items():
            parts = [f"{name} {value}" for name, value in zip(names, values, strict=True)]
            more = [f"and {len(parts) - _MOST_NAMED} more"] if len(parts) > _MOST_NAMED else []
            groups.append(Group(", ".join([label, *parts[:_MOST_NAMED], *more]), same))
    return groups


def _kind(run: Measured) -> dict[str, Any]:
    """The settings that decide the weights, and the step of the checkpoint."""
    config = {n: v for n, v in run["config"].items() if n not in WITHOUT_EFFECT}
    return config | ({} if run["step"] is None else {"step": run["step"]})


def _differing(kinds: Sequence[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for kind in kinds for name in kind)
    return [name for name in names if len({_text(kind.get(name)) for kind in kinds}) > 1]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def unlike(measured: Sequence[Measured]) -> list[str]:
    """Sentences on what makes a comparison of these runs wrong."""
    notes = []
    for name in ("data", "model", "holdout"):
        values = list(dict.fromkeys(str(run[name]) for run in measured))
        if len(values) > 1:
            notes.append(f"The runs differ in {name}: {', '.join(values)}.")
    for name in _differing([run["settings"] for run in measured]):
        values = list(dict.fromkeys(str(run["settings"][name]) for run in measured))
        notes.append(f"They were measured with different {name}: {' and '.join(values)}.")
    losses = [run["at_w"]["train"]["loss"] for run in measured]
    if max(losses) > _FITTED * min(losses):
        notes.append(
            f"Training losses at w reach from {min(losses):.3g} to {max(losses):.3g}: a run that "
            f"has fitted less may look flatter."
        )
    return notes


# Numbers of one run.


def rise(run: Measured, *, scope: str, direction: str, whole: bool, rho: float) -> float | None:
    """Training loss at w + eps minus that at w."""
    for row in run["ascent"]:
        same = (row["scope"], row["direction"], row["rho"]) == (scope, direction, rho)
        if same and (row["m"] in (None, run["settings"]["samples"])) == whole:
            return _minus(row["train"]["loss"], run["at_w"]["train"]["loss"])
    return None


def lost(run: Measured, bits: int) -> float | None:
    """Points of test top1 that rounding loses."""
    row = next(row for row in run["rounding"] if row["bits"] == bits)
    change = _minus(row["test"]["top1"], run["at_w"]["test"]["top1"])
    return None if change is None else 100 * change


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def middle(radii: Sequence[float]) -> float:
    """The radius of the table."""
    return sorted(radii)[len(radii) // 2]


def table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row for each group; mean ± sd where it has several runs."""
    settings = groups[0].runs[0]["settings"]
    radii = {"model": middle(settings["rho"]), "layer": middle(settings["layer_rho"])}
    kinds = [
        (f"{scope} {what}", {"scope": scope, "direction": d, "whole": w, "rho": radii[scope]})
        for scope in radii
        for what, d, w in (
            (f"rho {radii[scope]:g}", "gradient", True),
            (f"m {settings['m']}", "gradient", False),
            ("random", "random", True),
        )
    ]
    columns: list[tuple[str, Callable[[Measured], float | None], str]] = [
        ("train loss", lambda run: run["at_w"]["train"]["loss"], ".4f"),
        ("test top1", lambda run: 100 * run["at_w"]["test"]["top1"], ".2f"),
    ]
    columns += [(name, _rise_of(kind), ".4f") for name, kind in kinds]
    columns += [
        ("eigenvalue", lambda run: run["eigenvalues"]["largest"][0], ".4g"),
        ("trace", lambda run: run["trace"] and run["trace"]["mean"], ".4g"),
        *((f"int{b}", _lost_of(b), "+.2f") for b in BITS),
    ]
    head = ["", "n", *(name for name, *_ in columns)]
    rows = [
        [group.name, str(len(group.runs)), *(group.text(of, form) for _, of, form in columns)]
        for group in groups
    ]
    return head, rows


def _rise_of(kind: dict[str, Any]) -> Callable[[Measured], float | None]:
    return lambda run: rise(run, **kind)


def _lost_of(bits: int) -> Callable[[Measured], float | None]:
    return lambda run: lost(run, bits)


def caption(measured: Sequence[Measured]) -> str:
    """How to read the table."""
    s = measured[0]["settings"]
    return (
        f"train loss, test top1 (%): at the weights w, over {s['samples']:,} training and "
        f"{s['test_samples']:,} test images, in eval mode, without augmentation. model, layer: "
        f"rise of the training loss at w + eps along the gradient of all images (rho), of every "
        f"group of {s['m']} images on its own (m), and along a random direction of the same norm. "
        f"eigenvalue, trace: of the Hessian of the training loss. int8, int4: points of test top1 "
        f"after rounding. ±: standard deviation over n runs."
    )
