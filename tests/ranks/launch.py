"""Programs that the tests of ranks start, over loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fork_server

HERE = Path(__file__).parent


def play_train(folder: Path, ranks: int, cases: list[list[str]], timeout: int) -> None:
    """train.py's runs with these flags, one after another, on so many ranks."""
    play_trains(folder, {ranks: cases}, timeout)


def play_trains(folder: Path, cases: dict[int, list[list[str]]], timeout: int) -> None:
    """The same on each number of ranks in turn, in the order of the dictionary: one start."""
    file = folder / f"cases-{'-'.join(map(str, cases))}.json"
    file.write_text(json.dumps(list(cases.items())))
    run([sys.executable, str(HERE / "train_worker.py"), str(file)], timeout, {})


def play_train_by_horovod(folder: Path, ranks: int, cases: list[list[str]]) -> None:
    """The same under horovodrun; flags name the backend."""
    file = folder / f"cases-horovod-{ranks}.json"
    file.write_text(json.dumps(cases))
    horovodrun(ranks, "horovod_train_worker.py", file)


LO = "--network-interfaces lo"
HOROVOD = {  # what starts Horovod over gloo, and over MPI in two ways; without -np
    "gloo": f"horovodrun --gloo {LO}",
    "mpi": f"horovodrun --mpi {LO}",
    "mpirun": "mpirun --allow-run-as-root --oversubscribe --bind-to none "
    "--mca btl_tcp_if_include lo --mca oob_tcp_if_include lo",
}


def horovodrun(
    ranks: int,
    script: str | Path,
    *arguments: object,
    by: str = "forks",
    timeout: int = 1400,
    **env: str,
) -> str:
    """Run a script of this folder on `ranks` ranks: forked, with gloo, or started as one row of
    HOROVOD says."""
    command = [sys.executable, str(HERE / "horovod_forked.py"), str(ranks)]
    if by != "forks":
        command = [*HOROVOD[by].split(), "-np", str(ranks), sys.executable]
    return run([*command, str(HERE / script), *map(str, arguments)], timeout, env)


def run(command: list[str], timeout: int, env: dict[str, str]) -> str:
    """Run to the end, which must be a good one; returns what it printed. Scripts of this folder
    are forked from a process that has imported everything."""
    everything = environment(**env)
    if command[0] == sys.executable and Path(command[1]).parent == HERE:
        done = fork_server.run(list(map(str, command)), timeout, everything)
    else:
        done = subprocess.run(
            command, env=everything, capture_output=True, text=True, timeout=timeout, check=False
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
    fixed |= {"DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"}  # a crash says where it was
    fixed["MKL_CBWR"] = "AUTO"  # as train.py sets it: sums must not follow memory addresses
    return {**os.environ, **fixed, **more}
