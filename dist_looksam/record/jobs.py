"""`dist-looksam jobs`, `logs`, `cancel`: the runs of a folder and the jobs of SLURM's queue.

The state of a run is that of its SLURM job, as long as SLURM knows the job; otherwise the lock on
the run directory shows whether a process trains into it. Before a process of `dist-looksam submit`
has the lock, submitted.json names it.
"""

import json
import os
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
from . import metrics, processes, rundir
from .progress import h_mm_ss

COLUMNS = (
    "run", "job", "state", "nodes", "step", "top1", "images/s", "mfu", "GiB", "eta", "checkpoint",
    "requeues", "reason",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A SLURM job: `state` like RUNNING, `nodes` a host list, `output` the file of its output.

    `reason`: SLURM's word for why it waits or failed. `preempted`: another job takes or took its
    nodes; SLURM reports it while the job still runs.
    """

    state: str
    reason: str = "None"
    preempted: bool = False
    nodes: str = ""
    restarts: int = 0
    name: str = ""
    output: str = ""


def slurm_job(number: str) -> Queued | None:
    """The job in `scontrol show job`; None if SLURM does not know it, or is not installed."""
    if not shutil.which("scontrol"):
        return None
    shown = _output_of("scontrol", "-o", "show", "job", number).strip()
    job = dict(re.findall(r"(\w+)=(.*?)(?= [A-Z][\w:/]*=|$)", shown, re.MULTILINE))
    if "JobState" not in job:
        return None
    return Queued(
        state=job["JobState"],
        reason=job.get("Reason", "None"),
        preempted=":" in job.get("PreemptTime", ""),
        nodes=job.get("NodeList", "").replace("(null)", ""),
        restarts=int(job.get("Restarts", 0)),
        name=job.get("JobName", ""),
        output=job.get("StdOut", ""),
    )


def _output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def sbatch(command: Sequence[str], **env: str) -> str:
    """The number of the job that `sbatch --parsable ...` submits. RunError if SLURM refuses it."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **env}
    )
    match = re.match(r"(\d+)", done.stdout)
    if done.returncode or not match:
        raise RunError(f"sbatch refused: {' '.join((done.stderr or done.stdout).split())}")
    return match[1]


# squeue's states: in the queue, or failed within the few minutes that SLURM remembers.
_STATES = "PD,R,RQ,CF,CG,SI,S,ST,BF,F,NF,OOM,DL"


def queue() -> dict[str, Queued]:
    """The user's jobs in squeue by number, array elements separately; {} without SLURM."""
    if not shutil.which("squeue"):
        return {}
    text = _output_of("squeue", "--me", "--array", "-h", "-t", _STATES, "-o", "%i|%T|%N|%r|%j")
    rows = [line.strip().split("|", 4) for line in text.splitlines() if line.count("|") >= 4]
    return {i: Queued(state=s, nodes=n, reason=r, name=name) for i, s, n, r, name in rows}


def runs_in(folder: Path) -> list[Path]:
    """Run directories one or two levels below `folder`, or `folder` itself; oldest first."""
    marks = (rundir.CONFIG, rundir.SUBMITTED)  # the second before the job begins to train
    if any((folder / mark).exists() for mark in marks):
        return [folder]
    paths = [p for depth in ("*", "*/*") for mark in marks for p in folder.glob(f"{depth}/{mark}")]
    return list(dict.fromkeys(p.parent for p in sorted(paths, key=lambda p: p.stat().st_mtime)))


def _word(queued: Queued, restarts: int) -> str:
    """SLURM's state as a word of the table. `restarts`: requeues before the run's last start."""
    state = queued.state.replace("SIGNALING", "RUNNING")  # a signal is being delivered to some node
    if state in ("PENDING", "REQUEUED", "COMPLETING") and queued.restarts > restarts:
        return "requeued"
    if state in ("RUNNING", "COMPLETED") and queued.preempted:
        return "preempted"
    if state == "COMPLETED":
        return "stopped"  # without a summary: a signal has stopped it
    return {"PENDING": "waiting"}.get(state, state.lower().replace("_", " "))


def _reason(queued: Queued | None) -> str:
    return "-" if queued is None or queued.reason == "None" else queued.reason


def state_of(run: Path, job: dict[str, Any], queued: Queued | None) -> str:
    """One word: starting, running, finished, stopped, unknown, waiting, or SLURM's own."""
    if (run / rundir.SUMMARY).exists() and not (run / rundir.SUBMITTED).exists():
        return "finished"  # else a later start has not begun to train
    if queued is not None:
        return _word(queued, int(job.get("slurm_restarts", 0)))
    alive = rundir.alive(run)
    if alive is None and job.get("slurm_job_id") and shutil.which("scontrol"):
        return "stopped"  # SLURM does not know the job any more
    starter, running = job.get("started_by"), "running"
    begun = not (run / rundir.SUBMITTED).exists()
    if starter and (alive is None or not (alive or begun)):
        alive = processes.alive(starter)  # `submit` has started it, and that process ends last
        running = "running" if begun else "starting"
    return {True: running, False: "stopped", None: "unknown"}[alive]


def _last_error(run: Path, job: dict[str, Any], state: str) -> str | None:
    """The line at the end of a run's output that says why it ended; None if there is none."""
    if state in ("starting", "running", "waiting", "requeued", "preempted", "completing"):
        return None
    lines = _output(run, job)[-1 if state == "finished" else -60 :]
    own = [x for x in lines if x.startswith(("error: ", "error on "))]  # torchrun adds 30 lines
    found = own or _root_cause(lines)
    found = found or [x for x in lines[-15:] if "rror" in x or x.startswith("slurm.sbatch: ")]
    found = [x for x in found if not x.startswith(("srun: ", "slurmstepd: "))]
    return found[-1].strip() if found else None


def _root_cause(lines: Sequence[str]) -> list[str]:
    """What torchrun's report says of the first rank that has failed."""
    at = [n for n, line in enumerate(lines) if line.startswith("Root Cause (first")]
    if not at:
        return []
    about = dict(re.findall(r"^  (\w+) *: (.*)", "\n".join(lines[at[-1] :]), re.MULTILINE))
    signal = re.match(r"Signal \d+ \((\w+)\)", about.get("traceback", ""))
    how = (
        f"ended by {signal[1]}" if signal else f"exit code {about.get('exitcode', '?').split()[0]}"
    )
    return [f"rank {about.get('rank', '?').split()[0]} on {about.get('host', '?').strip()}: {how}"]


def _output(run: Path, job: dict[str, Any]) -> list[str]:
    """The output of a run's SLURM job, else its log.txt, as lines; [] where there is neither."""
    for path in (job.get("output"), run / rundir.LOG):
        if path and Path(path).is_file():
            return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    return []


def row_of(run: Path) -> dict[str, str]:
    """One line of the table, a text for each of COLUMNS; '-' for an unknown value."""
    job = rundir.job(run)
    number = job.get("slurm_job_id")
    queued = slurm_job(number) if number else None
    try:
        steps, evaluations = metrics.read(run / rundir.METRICS)
    except (FileNotFoundError, RunError):
        steps, evaluations = [], []
    config = run / rundir.CONFIG
    settings = yaml.safe_load(config.read_text()) if config.exists() else None
    total = int((settings or {}).get("steps") or 0)
    done = steps[-1]["step"] + 1 if steps else 0
    speed = metrics.rate([r["images_per_s"] for r in steps[-20:] if r.get("images_per_s")])
    mfu = metrics.rate([r["mfu"] for r in steps[-20:] if r.get("mfu")])  # older runs have none
    state = state_of(run, job, queued)
    row = dict.fromkeys(COLUMNS, "-")
    row |= {"run": str(run), "state": state, "step": f"{done}/{total or '?'}"}
    row["job"] = number or "-"
    row["reason"] = _last_error(run, job, state) or _reason(queued)
    row["nodes"] = (queued.nodes if queued else "") or ",".join(job.get("hosts", [])) or "-"
    if evaluations:
        row["top1"] = f"{evaluations[-1]['eval_top1']:.2%}"
    if speed:
        row["images/s"] = f"{speed:.0f}"
    if mfu:
        row["mfu"] = f"{mfu:.1%}"
    if steps and steps[-1].get("peak_memory"):
        row["GiB"] = f"{steps[-1]['peak_memory'] / 2**30:.1f}"
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
    """A row for each run in `folder`, then one for each of the user's jobs without a run yet."""
    rows = [_row_or_reason(run) for run in runs_in(folder)]  # [] where there is no folder
    known = {row["job"] for row in rows}
    for number, queued in queue().items():
        if number not in known:
            row = dict.fromkeys(COLUMNS, "-") | {"run": f"({queued.name})", "job": number}
            state = _word(queued, 0)
            row |= {"state": state, "nodes": queued.nodes or "-", "reason": _reason(queued)}
            if state not in (
                "waiting",
                "running",
                "requeued",
            ):  # ended before it made its directory
                output = {"output": (slurm_job(number) or queued).output}
                row["reason"] = _last_error(folder, output, state) or row["reason"]
            rows.append(row)
    return rows


def show_jobs(argv: Sequence[str]) -> int:
    """List the runs of a folder and the jobs of SLURM's queue, with state, step and accuracy."""
    parser = Parser(prog="dist-looksam jobs", description=show_jobs.__doc__)
    parser.add_argument("folder", nargs="?", help="folder of run directories; default runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object per run")
    flags = parser.parse_args(argv)
    folder = Path(flags.folder or "runs")
    rows = table(folder)
    if not folder.is_dir() and (flags.folder or not rows):  # a job may still be in the queue
        raise ConfigError(f"jobs needs a folder of runs, got {folder}; name the folder of --out.")
    if flags.json:
        print(*(json.dumps(row) for row in rows), sep="\n")
        return 0
    print(table_text(COLUMNS, [[row[c] for c in COLUMNS] for row in rows], left=len(COLUMNS)))
    return 0


_NUMBER = re.compile(r"\d+(_\d+)?")


def _named(name: str) -> tuple[Path | None, dict[str, Any], str | None]:
    """(run directory, content of its job.json, SLURM job) of a name that `jobs` shows: a run, the
    number of a job, or the (name) of a job without a run."""
    for path in (Path(name), Path("runs") / name):
        if any((path / n).exists() for n in (rundir.CONFIG, rundir.JOB, rundir.SUBMITTED)):
            job = rundir.job(path)
            return path, job, job.get("slurm_job_id")
    if _NUMBER.fullmatch(name):
        if slurm_job(name) is not None:
            return None, {}, name
        for path in runs_in(Path("runs")):  # SLURM has forgotten the job
            if (job := rundir.job(path)).get("slurm_job_id") == name:
                return path, job, name
    found = [number for number, queued in queue().items() if name == f"({queued.name})"]
    if len(found) == 1:
        return None, {}, found[0]
    if found:
        raise ConfigError(
            f"run must name one job, got {name}, the name of {', '.join(found)}; give a number."
        )
    raise ConfigError(
        f"run must be a run directory or the number of a SLURM job, got {name}; "
        f"`dist-looksam jobs` lists both."
    )


def show_log(argv: Sequence[str]) -> int:
    """Print the last lines of the output of a run's SLURM job, else of its log.txt."""
    parser = Parser(prog="dist-looksam logs", description=show_log.__doc__)
    parser.add_argument("run", help="run directory, or the number of a SLURM job")
    parser.add_argument("--lines", type=int, default=40, help="number of lines; default 40")
    flags = parser.parse_args(argv)
    if flags.lines < 1:
        raise ConfigError(f"lines must be >= 1, got {flags.lines}.")
    run, job, number = _named(flags.run)
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
    """Stop a run: its SLURM job by scancel, or its process of rank 0 on this host by SIGTERM."""
    parser = Parser(prog="dist-looksam cancel", description=cancel.__doc__)
    parser.add_argument("run", help="run directory, or the number of a SLURM job")
    name = parser.parse_args(argv).run
    run, job, number = _named(name)
    # Without both it is not a job of launch/slurm.sbatch: others may train in the same allocation.
    own_job = bool(number and job.get("output"))
    if run and not own_job and (pid := rundir.stop(run) or _stop_starting(run, job)):
        print(f"{run}: told process {pid} to stop")
    elif number and (slurm_job(number) or not shutil.which("scontrol")):
        _scancel(number)
        print(f"{run or name}: SLURM job {number} cancelled")
    elif number or (run and rundir.alive(run) is False):
        print(f"{run} is not running")
    elif run:
        host = rundir.holder(run).get("host") or job.get("host") or "another host"
        doubt = "runs" if rundir.alive(run) else "may run"
        raise ConfigError(f"{run} {doubt} on {host}, not here; cancel it there.")
    return 0


def _stop_starting(run: Path, job: dict[str, Any]) -> int | None:
    """SIGTERM to the launcher that `dist-looksam submit` has started here, unless it only ends."""
    if state_of(run, job, None) == "finished":
        return None
    return processes.terminate(job.get("started_by") or {})


def _scancel(number: str) -> None:
    if not shutil.which("scancel"):
        raise ConfigError(f"cancel needs scancel for SLURM job {number}, got none on this host.")
    done = subprocess.run(["scancel", number], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"scancel {number}: {done.stderr.strip()}")
