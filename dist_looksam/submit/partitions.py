"""SLURM's partitions, by sinfo: whether one can run a job of so many nodes, GPUs and hours."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError

_COLUMNS = "%P|%a|%l|%s|%D|%t|%G"
_LOST = ("down", "drain", "drng", "fail", "failg", "maint", "unk", "inval")  # %t, compact
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_TIMES = "30 (minutes), 1:30:00 or 2-12:00:00"


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """A line of sinfo: `count` nodes of one state in a partition. most: of a job; None: no limit.

    gpus: of each node, 0 where its GRES name none. seconds: of a job; None: no limit.
    cards: the types of its GPUs, "" where not named.
    """

    partition: str
    default: bool
    up: bool
    limit: str
    seconds: float | None
    most: int | None
    count: int
    works: bool
    gpus: int
    cards: tuple[str, ...]


def seconds_of(text: str) -> float | None:
    """Of SLURM's M, M:S, H:M:S, D-H, D-H:M and D-H:M:S; None for "infinite".

    Raises ValueError for another form.
    """
    if text.lower() in ("infinite", "unlimited"):
        return None
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError(text)
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # minutes first
        numbers.insert(0, 0)
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _line(text: str) -> Nodes:
    name, up, limit, sizes, count, state, gres = text.split("|", 6)
    most = sizes.split("-")[-1]
    found = re.findall(r"\bgpu(?::([^:,(]+))??:(\d+)", gres)
    return Nodes(
        partition=name.rstrip("*"),
        default=name.endswith("*"),
        up=up == "up",
        limit=limit,
        seconds=seconds_of(limit),
        most=int(most) if most.isdecimal() else None,
        count=int(count),
        works=state.rstrip("*~#!%$@^-+") not in _LOST and not state.endswith("*"),
        gpus=sum(int(count) for _, count in found),
        cards=tuple(card for card, _ in found),
    )


def _lines() -> list[Nodes]:
    if not shutil.which("sinfo"):
        raise ConfigError("partitions are listed by sinfo, got none on the path; add it to PATH.")
    command = ["sinfo", "--noheader", f"--format={_COLUMNS}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stdout.splitlines() if line.count("|") >= 6]
    if done.returncode or not lines:
        why = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise ConfigError(
            f"sinfo must list partitions, got {why[-1]}; is SLURM's controller up? To train on "
            f"this machine use --on here."
        )
    return [_line(line) for line in lines]


def check(*, nodes: int, gpus: int, time: str | None, name: str | None) -> tuple[str, list[str]]:
    """A line about the partition `name`, by default SLURM's own, and the types of its GPUs.

    gpus: of each node; 0: none are asked for. name: or several, with commas between, of which SLURM
    takes one. A type is that of a GRES, like "h100"; "": not named.
    Raises ConfigError where none of them can run the job.
    """
    lines = _lines()
    names = ", ".join(dict.fromkeys(line.partition for line in lines))
    texts, cards, errors = [], set(), []
    for one in name.split(",") if name else [None]:
        own = [line for line in lines if (line.partition == one if one else line.default)]
        if not own:
            got = f"got {one}" if one else "got none, and SLURM has no default"
            raise ConfigError(f"partition must be one of {names}, {got}; use --partition.")
        try:
            text, some = _check(own, nodes=nodes, gpus=gpus, time=time, names=names)
        except ConfigError as error:
            errors.append(error)
        else:
            texts.append(text)
            cards |= some
    if not texts:
        raise errors[0]
    return " or ".join(texts), sorted(cards)


def _check(
    own: Sequence[Nodes], *, nodes: int, gpus: int, time: str | None, names: str
) -> tuple[str, set[str]]:
    """See `check`; `own` are the lines of one partition."""
    first = own[0]
    what = f"partition {first.partition}"
    if not first.up:
        raise ConfigError(f"{what} must be up, got inactive; sinfo lists {names}.")
    working = _with_gpus([line for line in own if line.works], gpus, what)
    count = sum(line.count for line in working)
    if nodes > count:
        raise ConfigError(
            f"nodes must be <= the {count} of {what} that work{f' with {gpus} GPUs' * bool(gpus)}, "
            f"got {nodes}; use fewer, or another --partition of {names}."
        )
    if first.most is not None and nodes > first.most:
        raise ConfigError(
            f"nodes must be <= the {first.most} that {what} gives one job, got {nodes}; use "
            f"--nodes {first.most}, or another --partition of {names}."
        )
    _check_time(time, first, what)
    cards = {card for line in working for card in line.cards}
    return f"{what}: {nodes} of {count} nodes, at most {first.limit}", cards


def _with_gpus(working: Sequence[Nodes], gpus: int, what: str) -> list[Nodes]:
    """Those with so many GPUs."""
    most = max((line.gpus for line in working), default=0)
    if gpus and working and not most:
        raise ConfigError(
            f"gpus must be on the nodes, got {gpus} and {what}, for which sinfo lists none (GRES); "
            f"name another --partition, or train on CPUs: -- --device cpu."
        )
    if working and gpus > most:
        raise ConfigError(
            f"gpus must be <= the {most} of a node of {what}, got {gpus}; use --gpus {most}, and "
            f"more --nodes."
        )
    return [line for line in working if line.gpus >= gpus]


def _check_time(time: str | None, partition: Nodes, what: str) -> None:
    if time is None:
        return
    try:
        asked = seconds_of(time)
    except ValueError:
        raise ConfigError(f"time must be like {_TIMES}, got {time!r}.") from None
    limit = partition.seconds
    if limit is not None and (asked is None or asked > limit):
        raise ConfigError(
            f"time must be <= the {partition.limit} of {what}, got {time}; use less (a requeued "
            f"job continues), or another --partition."
        )
