"""cluster/testbed/ from Python: hosts, jobs and faults."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "cluster" / "testbed"
SITE = {"SITE": f"{ROOT}/cluster/sites/testbed.sh", "PYTHON": sys.executable}
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}


def until(
    told: Callable[[], object], seconds: float, words: Callable[[], str] = lambda: "nothing"
) -> None:
    """Ask until the answer is true; after `seconds` a failure that says `words`."""
    end = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < end, f"after {seconds} s: {words()}"
        time.sleep(0.2)


def trains(run: Path) -> None:
    """Wait until `run` has told of its first steps: every rank trains, and minds signals. (The file
    is made when rank 0 is ready; on busy cores another was seconds behind.)"""
    file = run / "metrics.jsonl"
    until(lambda: file.exists() and file.stat().st_size, 400)


@dataclass(frozen=True)
class Cluster:
    """One testbed, by name. Hosts are head, node1 .. node8; they see the same files, but for /tmp,
    of which they share the session's tmp_path folders and the project."""

    name: str
    nodes: int = 8
    share: str = ""

    def script(
        self, name: str, *arguments: str, timeout: float = 120, **how
    ) -> subprocess.CompletedProcess:
        """Run one of cluster/testbed/'s scripts for this testbed."""
        settings = {
            "TESTBED_NAME": self.name,
            "TESTBED_NODES": str(self.nodes),
            "TESTBED_SHARE": self.share,
            "TESTBED_OWNER": str(os.getpid()),
        }
        return subprocess.run(
            [str(SCRIPTS / name), *map(str, arguments)],
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            **how,
        )

    def on(
        self,
        host: str,
        *command: str,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        check: bool = True,
        timeout: float = 120,
    ) -> str:
        """What `command` printed on `host`, in a fresh login's environment plus `env`."""
        settings = [f"{k}={v}" for k, v in (env or {}).items()]
        done = self.script("on.sh", host, "env", *settings, *command, cwd=cwd, timeout=timeout)
        if check and done.returncode:
            pytest.fail(f"on {host}: {command} exited {done.returncode}:\n{done.stdout}")
        return done.stdout

    def fault(self, verb: str, host: str, *settings: str) -> None:
        """crash, powercut, restart, unplug, replug, slow, fast: see cluster/testbed/lib.sh."""
        done = self.script("on.sh", verb, host, *settings)
        assert done.returncode == 0, done.stdout

    def submit(self, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> str:
        """sbatch on the head; the job's number."""
        said = self.on("head", "sbatch", "--parsable", *arguments, cwd=cwd, env=env)
        return said.split()[-1].split(";")[0]

    def train(
        self,
        *flags: str,
        cwd: Path,
        nodes: int,
        options: tuple[str, ...] = (),
        out: str = "runs/r",
        env: dict[str, str] | None = None,
    ) -> str:
        """launch/slurm.sbatch, submitted on the head with `options` of sbatch; the job's number."""
        script = f"{ROOT}/launch/slurm.sbatch"
        return self.submit(
            f"--nodes={nodes}", *options, script, *flags, "--out", out,
            cwd=cwd, env=SITE | (env or {}),
        )  # fmt: skip

    def shown(self, folder: Path, job: str) -> dict[str, str]:
        """The job's row in `dist-looksam jobs`, called on the head in `folder`; {} for none."""
        command = [sys.executable, "-m", "dist_looksam.cli.main", "jobs", "--json"]
        said = self.on("head", *command, cwd=folder, env={"PYTHONPATH": str(ROOT)})
        rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        return next((row for row in rows if row["job"] == job), {})

    def shown_as(self, state: str, folder: Path, job: str, *, timeout: float) -> dict[str, str]:
        """The job's row as soon as the table says `state`."""
        rows: list[dict[str, str]] = [{}]

        def there() -> bool:
            rows[0] = self.shown(folder, job)
            return rows[0].get("state") == state

        until(there, timeout, lambda: f"job {job} is {rows[0]}, not {state}")
        return rows[0]

    def told(self, job: str, field: str) -> str:
        """One field of `scontrol show job`, like Restarts; "" where there is none."""
        said = self.on("head", "scontrol", "-o", "show", "job", job)
        found = re.search(rf"\b{field}=(\S+)", said)
        return found[1] if found else ""

    def state(self, job: str) -> str:
        """PENDING, RUNNING, ... or one of OVER."""
        return self.told(job, "JobState") or "UNKNOWN"

    def wait(self, job: str, *, until: set[str] = OVER, timeout: float = 120) -> str:
        """The first of the states `until` that the job is in. (`sbatch --wait` is seconds late.)"""
        end = time.monotonic() + timeout
        while (state := self.state(job)) not in until:
            if time.monotonic() > end:
                queue = self.on("head", "squeue", "-l", check=False)
                pytest.fail(f"job {job} is {state} after {timeout} s, not {until}:\n{queue}")
            time.sleep(0.3)
        return state

    def up(self) -> None:
        """Start it; where it runs, bring back lost hosts and repair cables."""
        done = self.script("up.sh", timeout=300)
        assert done.returncode == 0, done.stdout

    def down(self) -> None:
        self.script("down.sh")
