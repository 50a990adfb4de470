"""Points as a SLURM job array, one element each, and a small job after it that sends the rest."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .. import files, project
from ..errors import ConfigError, RunError
from ..record.jobs import sbatch
from .grid import Point
from .ledger import Ledger

SCRIPT = project.FOLDER / "launch" / "slurm.sbatch"
MOST_TRIES = 3  # a point that failed so often is not sent again
_PAUSES = (1, 2, 4, 8, 16, 32, 64, 64, 64)  # seconds between questions to SLURM


def submit(ledger: Ledger, *, again: Sequence[str], at_once: int, options: Sequence[str]) -> str:
    """Send every point that is due and not yet in the queue; returns a sentence for the user.

    Where trials must end before other points are known, a job that depends on the array runs
    `again`, the same command. `options` are sbatch's.
    Raises ConfigError without sbatch; RunError where points failed again and again.
    """
    if not shutil.which("sbatch"):
        raise ConfigError(
            "--slurm needs sbatch on the path, got none here; call it on a login node, or leave "
            "--slurm out."
        )
    history = _history(ledger)
    live = [job for job, _ in history if _in_queue(job)]
    queued = {name for job, names in history if job in live for name in names}
    due, done = ledger.due()
    tries = Counter(name for _, names in history for name in names)
    new = [p for p in due if p.name not in queued and tries[p.name] < MOST_TRIES]
    if not new and not queued:
        if due:
            raise RunError(
                f"{len(due)} points failed {MOST_TRIES} times, first {due[0].name}; see "
                f"{ledger.out / 'logs'}, then remove {_file(ledger)} to try again."
            )
        return f"all {len(done)} points are done"
    report = f"{len(done)} points are done, {len(queued)} are in the queue"
    if new:
        live.append(_send(ledger, new, at_once, options))
        report += f", {len(new)} were sent as array {live[-1]}"
    follow = _follow(ledger, live, again, options, anew=bool(new))
    return f"{report}; job {follow} goes on when they have ended"


def _send(ledger: Ledger, points: list[Point], at_once: int, options: Sequence[str]) -> str:
    folder = ledger.out / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    (ledger.out / "logs").mkdir(exist_ok=True)
    lines = files.first_free(folder / "lines-", ".txt")
    for point in points:
        ledger.prepare(point)
    words = [[*p.argv(), "--out", str(ledger.path(p))] for p in points]
    lines.write_text("".join(shlex.join(w) + "\n" for w in words))
    array = f"--array=1-{len(points)}" + (f"%{at_once}" if at_once else "")
    output = f"--output={ledger.out}/logs/slurm-%A_%a.out"
    command = ["sbatch", "--parsable", array, output, "--job-name=sweep", *options, str(SCRIPT)]
    own = project.INSTALLED and not os.environ.get("CONTAINER")  # which has a Python
    python = {"PYTHON": os.environ.get("PYTHON", sys.executable)} if own else {}
    job = sbatch(command, SWEEP=str(lines), **python)
    with _file(ledger).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"job": job, "points": [p.name for p in points]}) + "\n")
    return job


def _follow(
    ledger: Ledger, jobs: list[str], again: Sequence[str], options: Sequence[str], *, anew: bool
) -> str:
    """The job that runs `again` after `jobs`: the one that waits already, or a new one.

    It gets the user's options (account, partition, ...), and one task.
    """
    file = ledger.out / "slurm" / "follow.txt"
    waits = file.read_text().strip() if file.exists() else ""
    own = os.environ.get("SLURM_JOB_ID")  # this may be that job
    if not anew and waits and waits != own and _in_queue(waits):
        return waits
    line = shlex.join([sys.executable, "-m", "dist_looksam.cli.main", "sweep", *again])
    command = ["sbatch", "--parsable", *options, "--job-name=sweep-goes-on"]
    command += [f"--dependency=afterany:{':'.join(jobs)}", "--nodes=1", "--ntasks=1"]
    command += ["--ntasks-per-node=1", f"--output={ledger.out}/logs/slurm-%j.out"]
    number = sbatch([*command, f"--wrap={line}"])
    file.write_text(number + "\n")
    return number


def _in_queue(job: str) -> bool:
    """Whether any element of an array waits or runs. RunError if SLURM does not answer, because
    points that are not in the queue are sent again, and their folders cleared. In a job, where
    nobody calls again, it is asked for some minutes: its controller may restart."""
    for pause in (*_PAUSES, 0) if os.environ.get("SLURM_JOB_ID") else (0,):
        done = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, check=False
        )
        silent = done.returncode != 0 and "Invalid job id" not in done.stderr
        if not silent:
            break
        time.sleep(pause)
    if silent:
        raise RunError(f"squeue does not answer: {' '.join(done.stderr.split())}; call again.")
    return done.returncode == 0 and bool(done.stdout.strip())


def _file(ledger: Ledger) -> Path:
    return ledger.out / "slurm" / "arrays.jsonl"


def _history(ledger: Ledger) -> list[tuple[str, list[str]]]:
    """(job, points) of every array sent so far."""
    return [(row["job"], row["points"]) for row in files.json_lines(_file(ledger))]
