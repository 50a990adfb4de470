"""`dist-looksam jobs`, `logs`, `cancel`: runs of a folder together with SLURM's queue.

A run is known by the files of its directory. Whether it lives is SLURM's word where it has a job
that SLURM knows, and else that of the lock on its directory.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import checkpoint
from ..cli.arguments import Parser
from ..cli.table import text as table_text
from ..errors import ConfigError, RunError
from . import metrics, rundir
from .progress import h_mm_ss

COLUMNS = (
    "run", "job", "state", "nodes", "step", "top1", "images/s", "eta", "checkpoint", "requeues",
    "reason",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A job as SLURM tells it: `state` like RUNNING, `nodes` a host list, its file of output.

    `reason`: why it waits or failed, in SLURM's word. `preempted`: another job takes or took its
    nodes; the job is told while it still runs.
    """

    state: str
    reason: str = "None"
    preempted: bool = False
    nodes: str = ""
    restarts: int = 0
    name: str = ""
    output: str = ""


def slurm_job(number: str) -> Queued | None:
    """What `scontrol show job` says; None where it has forgotten the job, or there is no SLURM."""
    if not shutil.which("scontrol"):
        return None
    said = subprocess.run(
        ["scontrol", "-o", "show", "job", number], capture_output=True, text=True, check=False
    ).stdout
    found = dict(re.findall(r"(\w+)=(\S+)", said))
    if "JobState" not in found:
        return None
    return Queued(
        state=found["JobState"],
        reason=found.get("Reason", "None"),
        preempted=":" in found.get("PreemptTime", ""),
        nodes=found.get("NodeList", "").replace("(null)", ""),
        restarts=int(found.get("Restarts", 0)),
        name=found.get("JobName", ""),
        output=found.get("StdOut", ""),
    )


# squeue's states: in the queue, and ended badly a few minutes ago at most, before SLURM forgets it.
_STATES = "PD,R,RQ,CF,CG,SI,S,ST,BF,F,NF,OOM,DL"


def queue() -> dict[str, Queued]:
    """The caller's jobs in squeue, by number, an array's elements apart; empty without SLURM."""
    if not shutil.which("squeue"):
        return {}
    command = ["squeue", "--me", "--array", "-h", "-t", _STATES, "-o", "%i|%T|%N|%r|%j"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    rows = [line.strip().split("|", 4) for line in said.splitlines() if line.count("|") >= 4]
    return {i: Queued(state=s, nodes=n, reason=r, name=name) for i, s, n, r, name in rows}


def runs_in(folder: Path) -> list[Path]:
    """Run directories in `folder`, at any depth up to two, or `folder` itself; oldest first."""
    marks = (rundir.CONFIG, rundir.SUBMITTED)  # the second: a job that has not begun to train
    if any((folder / mark).exists() for mark in marks):
        return [folder]
    found = [p for depth in ("*", "*/*") for mark in marks for p in folder.glob(f"{depth}/{mark}")]
    return list(dict.fromkeys(p.parent for p in sorted(found, key=lambda p: p.stat().st_mtime)))


def _word(queued: Queued, restarts: int) -> str:
    """SLURM's state as a word of the table. `restarts`: how often the run had been requeued when it
    last started."""
    state = queued.state.replace("SIGNALING", "RUNNING")  # a signal is on its way to some node
    if state in ("PENDING", "REQUEUED", "COMPLETING") and queued.restarts > restarts:
        return "requeued"
    if state in ("RUNNING", "COMPLETED") and queued.preempted:
        return "preempted"
    if state == "COMPLETED":
        return "stopped"  # no summary: it was told to stop
    return {"PENDING": "waiting"}.get(state, state.lower().replace("_", " "))


def _reason(queued: Queued | None) -> str:
    return "-" if queued is None or queued.reason == "None" else queued.reason


def state_of(run: Path, job: dict[str, Any], queued: Queued | None) -> str:
    """One word: running, finished, stopped, unknown, waiting, requeued, or SLURM's own."""
    if (run / rundir.SUMMARY).exists():
        return "finished"
    if queued is not None:
        return _word(queued, int(job.get("slurm_restarts", 0)))
    alive = rundir.alive(run)
    if alive is None and job.get("slurm_job_id") and shutil.which("scontrol"):
        return "stopped"  # SLURM has forgotten the job, so it has ended
    return {True: "running", False: "stopped", None: "unknown"}[alive]


def _last_words(run: Path, job: dict[str, Any], state: str) -> str | None:
    """What ended a run, from the end of its output; None if nothing did or it is not said there."""
    if state in ("running", "waiting", "requeued", "preempted", "completing"):
        return None
    lines = _output(run, job)[-1 if state == "finished" else -15 :]
    said = [x for x in lines if "rror" in x or x.startswith("slurm.sbatch: ")]
    said = [x for x in said if not x.startswith(("srun: ", "slurmstepd: "))]
    return said[-1].strip() if said else None


def _output(run: Path, job: dict[str, Any]) -> list[str]:
    """The lines that a run's SLURM job printed, else those of its log.txt; [] where neither is."""
    for path in (job.get("output"), run / rundir.LOG):
        if path and Path(path).is_file():
            return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    return []


def row_of(run: Path) -> dict[str, str]:
    """One line of the table, a text for each of COLUMNS; '-' for what is not known."""
    job = rundir.job(run)
    number = job.get("slurm_job_id")
    queued = slurm_job(number) if number else None
    try:
        steps, evaluations = metrics.read(run / "metrics.jsonl")
    except (FileNotFoundError, RunError):
        steps, evaluations = [], []
    config = run / rundir.CONFIG
    settings = yaml.safe_load(config.read_text()) if config.exists() else None
    total = int((settings or {}).get("steps") or 0)
    done = steps[-1]["step"] + 1 if steps else 0
    recent = [r["images_per_s"] for r in steps[-20:] if r.get("images_per_s")]
    state = state_of(run, job, queued)
    row = dict.fromkeys(COLUMNS, "-")
    row |= {"run": str(run), "state": state, "step": f"{done}/{total or '?'}"}
    row["job"] = number or "-"
    row["reason"] = _last_words(run, job, state) or _reason(queued)
    row["nodes"] = (queued.nodes if queued else "") or ",".join(job.get("hosts", [])) or "-"
    if evaluations:
        row["top1"] = f"{evaluations[-1]['eval_top1']:.2%}"
    if recent:
        row["images/s"] = f"{sum(recent) / len(recent):.0f}"
    if state == "running" and steps and steps[-1]["seconds"]:
        row["eta"] = h_mm_ss(max(total - done, 0) * steps[-1]["seconds"] / done)
    saved = checkpoint.found(run / "checkpoints")
    row["checkpoint"] = saved[0].name if saved else "-"
    row["requeues"] = str(max(queued.restarts if queued else 0, job.get("slurm_restarts", 0)))
    return row


def _row_or_reason(run: Path) -> dict[str, str]:
    """`row_of`; of a directory whose files are damaged or of another program, why it is not."""
    try:
        return row_of(run)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        why = f"cannot be read: {' '.join(str(error).split())}"
        return dict.fromkeys(COLUMNS, "-") | {"run": str(run), "state": "unknown", "reason": why}


def table(folder: Path) -> list[dict[str, str]]:
    """A row for each run in `folder`, then one for each of the caller's jobs that has none yet."""
    rows = [_row_or_reason(run) for run in runs_in(folder)]  # none where it is not there
    known = {row["job"] for row in rows}
    for number, queued in queue().items():
        if number not in known:
            row = dict.fromkeys(COLUMNS, "-") | {"run": f"({queued.name})", "job": number}
            state = _word(queued, 0)
            row |= {"state": state, "nodes": queued.nodes or "-", "reason": _reason(queued)}
            if state not in ("waiting", "running", "requeued"):  # died before it had a directory
                output = {"output": (slurm_job(number) or queued).output}
                row["reason"] = _last_words(folder, output, state) or row["reason"]
            rows.append(row)
    return rows


def show_jobs(argv: Sequence[str]) -> int:
    """Print the table, or JSON with --json."""
    parser = Parser(prog="dist-looksam jobs", description=__doc__)
    parser.add_argument("folder", nargs="?", help="where the runs are (runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    flags = parser.parse_args(argv)
    folder = Path(flags.folder or "runs")
    rows = table(folder)
    if not folder.is_dir() and (flags.folder or not rows):  # the first job may be in the queue
        raise ConfigError(f"jobs needs a folder of runs, got {folder}; name the folder of --out.")
    if flags.json:
        print(*(json.dumps(row) for row in rows), sep="\n")
        return 0
    print(table_text(COLUMNS, [[row[c] for c in COLUMNS] for row in rows], left=len(COLUMNS)))
    return 0


def _run_named(name: str) -> Path:
    for path in (Path(name), Path("runs") / name):
        if any((path / n).exists() for n in (rundir.CONFIG, rundir.JOB, rundir.SUBMITTED)):
            return path
    raise ConfigError(
        f"run must be a run directory or the number of a SLURM job, got {name}; "
        f"`dist-looksam jobs` lists both."
    )


def _job_of(name: str) -> tuple[Path | None, str | None]:
    """(run directory, SLURM job) that `name` means: one of them, or both."""
    try:
        run = _run_named(name)
    except ConfigError:
        if _NUMBER.fullmatch(name) and slurm_job(name) is not None:
            return None, name
        raise
    return run, rundir.job(run).get("slurm_job_id")


_NUMBER = re.compile(r"\d+(_\d+)?")


def show_log(argv: Sequence[str]) -> int:
    """Print the last lines of what a run's SLURM job wrote, else of its own log.txt."""
    parser = Parser(prog="dist-looksam logs", description=show_log.__doc__)
    parser.add_argument("run", help="run directory, or the number of a SLURM job")
    parser.add_argument("--lines", type=int, default=40, help="how many of the last lines (40)")
    flags = parser.parse_args(argv)
    if flags.lines < 1:
        raise ConfigError(f"lines must be >= 1, got {flags.lines}.")
    run, number = _job_of(flags.run)
    job = rundir.job(run) if run else {}
    queued = slurm_job(number) if number else None
    if queued and queued.output:
        job = job | {"output": queued.output}
    lines = _output(run or Path(), job)
    if not lines:
        raise ConfigError(
            f"logs needs the output of a SLURM job or {(run or Path()) / rundir.LOG}, got neither; "
            f"has rank 0 begun?"
        )
    print(*lines[-flags.lines :], sep="\n")
    return 0


def cancel(argv: Sequence[str]) -> int:
    """Stop a run: its SLURM job by scancel, else its process of rank 0 on this host by SIGTERM."""
    parser = Parser(prog="dist-looksam cancel", description=cancel.__doc__)
    parser.add_argument("run", help="run directory, or the number of a SLURM job")
    name = parser.parse_args(argv).run
    run, number = _job_of(name)
    job = rundir.job(run) if run else {}
    if run and not job.get("output") and (pid := rundir.stop(run)):
        # Not of launch/slurm.sbatch: the job may be an allocation in which other runs live, too.
        print(f"{run}: told process {pid} to stop")
    elif number:
        _scancel(number)
        print(f"{run or name}: SLURM job {number} cancelled")
    elif run and rundir.alive(run) is False:
        print(f"{run} is not running")
    elif run:
        host = rundir.holder(run).get("host") or job.get("host") or "another host"
        doubt = "runs" if rundir.alive(run) else "may run"
        raise ConfigError(f"{run} {doubt} on {host}, not here; cancel it there.")
    return 0


def _scancel(number: str) -> None:
    if not shutil.which("scancel"):
        raise ConfigError(f"cancel needs scancel for SLURM job {number}, got none on this host.")
    done = subprocess.run(["scancel", number], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"scancel {number}: {done.stderr.strip()}")
