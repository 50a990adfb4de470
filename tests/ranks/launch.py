"""Real ranks on this machine: one start per number of ranks, since starting is what costs."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def torchrun(ranks: int, script: str, *arguments: object, timeout: int = 1400, **env: str) -> str:
    """Run a script of this folder on `ranks` ranks over loopback; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(ranks), str(HERE / script), *map(str, arguments)]
    return run(command, timeout, env)


def horovodrun(
    ranks: int, script: str | Path, *arguments: object, timeout: int = 1400, **env: str
) -> str:
    """The same with horovodrun over gloo, which needs no mpirun."""
    command = ["horovodrun", "--gloo", "-np", str(ranks), "--network-interfaces", "lo"]
    command += [sys.executable, str(HERE / script), *map(str, arguments)]
    return run(command, timeout, env)


def run(command: list[str], timeout: int, env: dict[str, str]) -> str:
    """Run to the end, which must be a good one; returns what it printed."""
    done = subprocess.run(
        command,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    """The tests' own, with one thread per rank, loopback, and the package and tests on the path."""
    root = HERE.parents[1]
    path = os.pathsep.join(
        [str(HERE), str(HERE.parent), str(root), os.environ.get("PYTHONPATH", "")]
    )
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, **fixed, "DS_ACCELERATOR": "cpu", **more}
