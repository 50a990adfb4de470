"""`dist-looksam jobs`, `logs`, `cancel`: runs of a folder together with SLURM's queue.

A run is known by its job.json, config.yaml, metrics.jsonl and summary.json; what SLURM says of its
job, where it has one, wins over what the files let one guess.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
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

QUIET_SECONDS = 120  # a run elsewhere that wrote nothing for so long is taken for dead
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


def waiting() -> dict[str, Queued]:
    """The caller's jobs in squeue, by number; empty without SLURM."""
    if not shutil.which("squeue"):
        return {}
    command = ["squeue", "--me", "-h", "-o", "%i|%T|%N|%r|%j"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    rows = [line.strip().split("|", 4) for line in said.splitlines() if line.count("|") >= 4]
    return {i: Queued(state=s, nodes=n, reason=r, name=name) for i, s, n, r, name in rows}


def runs_in(folder: Path) -> list[Path]:
    """Run directories in `folder`, at any depth up to two, or `folder` itself."""
    if (folder / "config.yaml").exists():
        return [folder]
    found = {p.parent for depth in ("*", "*/*") for p in folder.glob(f"{depth}/config.yaml")}
    return sorted(found, key=lambda p: (p / "config.yaml").stat().st_mtime)


def _alive(job: dict[str, Any], run: Path) -> bool:
    """Whether a run outside SLURM goes on: its process is here, or its metrics are fresh."""
    if job.get("host") == socket.gethostname():
        try:  # another process may have got the number since
            return b"train" in Path(f"/proc/{job['pid']}/cmdline").read_bytes()
        except (OSError, KeyError):
            return False
    newest = max((p.stat().st_mtime for p in run.glob("*.jsonl")), default=0.0)
    return time.time() - max(newest, float(job.get("started", 0))) < QUIET_SECONDS


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
    """running, finished, waiting and requeued (in SLURM's queue), stopped, or SLURM's own word."""
    if (run / "summary.json").exists():
        return "finished"
    if queued is not None:
        return _word(queued, int(job.get("slurm_restarts", 0)))
    return "running" if not job.get("slurm_job_id") and _alive(job, run) else "stopped"


def _duration(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def row_of(run: Path) -> dict[str, str]:
    """One line of the table, a text for each of COLUMNS; '-' for what is not known."""
    job = rundir.job(run)
    number = job.get("slurm_job_id")
    queued = slurm_job(number) if number else None
    try:
        steps, evaluations = metrics.read(run / "metrics.jsonl")
    except (FileNotFoundError, RunError):
        steps, evaluations = [], []
    total = int((yaml.safe_load((run / "config.yaml").read_text()) or {}).get("steps") or 0)
    done = steps[-1]["step"] + 1 if steps else 0
    recent = [r["images_per_s"] for r in steps[-20:] if r.get("images_per_s")]
    state = state_of(run, job, queued)
    row = dict.fromkeys(COLUMNS, "-")
    row |= {"run": str(run), "state": state, "step": f"{done}/{total or '?'}"}
    row["job"] = number or "-"
    row["reason"] = _reason(queued)
    row["nodes"] = (queued.nodes if queued else "") or ",".join(job.get("hosts", [])) or "-"
    if evaluations:
        row["top1"] = f"{evaluations[-1]['eval_top1']:.2%}"
    if recent:
        row["images/s"] = f"{sum(recent) / len(recent):.0f}"
    if state == "running" and steps and steps[-1]["seconds"]:
        row["eta"] = _duration(max(total - done, 0) * steps[-1]["seconds"] / done)
    saved = checkpoint.found(run / "checkpoints")
    row["checkpoint"] = saved[0].name if saved else "-"
    row["requeues"] = str(max(queued.restarts if queued else 0, job.get("slurm_restarts", 0)))
    return row


def table(folder: Path) -> list[dict[str, str]]:
    """A row for each run in `folder`, then one for each of the caller's jobs that has none yet."""
    rows = [row_of(run) for run in runs_in(folder)]  # none where it is not there
    known = {row["job"] for row in rows}
    for number, queued in waiting().items():
        if number not in known:
            row = dict.fromkeys(COLUMNS, "-") | {"run": f"({queued.name})", "job": number}
            row |= {"state": _word(queued, 0), "nodes": queued.nodes or "-"}
            rows.append(row | {"reason": _reason(queued)})
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
        if (path / "config.yaml").exists() or (path / rundir.JOB).exists():
            return path
    raise ConfigError(f"run must be a run directory, got {name}; `dist-looksam jobs` lists them.")


def show_log(argv: Sequence[str]) -> int:
    """Print the last lines of what a run's SLURM job wrote, else of its own log.txt."""
    parser = Parser(prog="dist-looksam logs", description=show_log.__doc__)
    parser.add_argument("run", help="run directory")
    parser.add_argument("--lines", type=int, default=40, help="how many of the last lines (40)")
    flags = parser.parse_args(argv)
    run = _run_named(flags.run)
    job = rundir.job(run)
    path = job.get("output")
    number = job.get("slurm_job_id")
    queued = slurm_job(number) if number else None
    path = queued.output if queued and queued.output else path
    if not path or not Path(path).is_file():
        path = run / rundir.LOG
    if not Path(path).is_file():
        raise ConfigError(
            f"logs needs the output of a SLURM job or {path}, got neither; has rank 0 begun?"
        )
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    print(*lines[-flags.lines :], sep="\n")
    return 0


def cancel(argv: Sequence[str]) -> int:
    """Stop a run: its SLURM job by scancel, else its process of rank 0 on this host by SIGTERM."""
    parser = Parser(prog="dist-looksam cancel", description=cancel.__doc__)
    parser.add_argument("run", help="run directory")
    run = _run_named(parser.parse_args(argv).run)
    job = rundir.job(run)
    if number := job.get("slurm_job_id"):
        if not shutil.which("scancel"):
            raise ConfigError(
                f"cancel needs scancel for SLURM job {number}, got none on this host."
            )
        done = subprocess.run(["scancel", number], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"scancel {number}: {done.stderr.strip()}")
        print(f"{run}: SLURM job {number} cancelled")
        return 0
    if (run / "summary.json").exists() or not _alive(job, run):
        print(f"{run} is not running")
        return 0
    if job.get("host") != socket.gethostname():
        raise ConfigError(f"{run} runs on {job.get('host')}, not here; cancel it there.")
    os.kill(int(job["pid"]), signal.SIGTERM)
    print(f"{run}: told process {job['pid']} to stop")
    return 0
