"""Horovod over gloo and MPI on eight nodes, sharded on four, gives the weights of one process."""

import sys
from pathlib import Path

import pytest
from test_launch import FLAGS, ROOT, SITE, TOLERANCE, differs
from testbed import Cluster

pytestmark = [pytest.mark.needs("slurm", "horovod", "mpi"), pytest.mark.timeout(1200)]

PROGRAMS = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
HOSTS = ",".join(f"node{i}:1" for i in range(1, 9))
# The cache would remember that ssh once worked, for hosts of another testbed of the same names.
EIGHT = ["-np", "8", "-H", HOSTS, "--network-interfaces", "eth0", "--disable-cache"]


def by_the_script_over_gloo(testbed: Cluster, folder: Path) -> None:
    command = ["bash", f"{ROOT}/launch/horovod.sh", "--gloo", *EIGHT, "--", *FLAGS]
    testbed.on("head", *command, "--out", "run", cwd=folder, env=SITE, timeout=400)


def by_horovodrun_over_mpi(testbed: Cluster, folder: Path) -> None:
    """Nothing says horovod but the program's name: `--backend auto` must know it on every node."""
    command = ["horovodrun", "--mpi", *EIGHT, sys.executable, f"{ROOT}/train.py", *FLAGS]
    env = {"PATH": PROGRAMS, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    testbed.on("head", *command, "--out", "run", cwd=folder, env=env, timeout=400)


def by_slurm_over_mpi_and_sharded(testbed: Cluster, folder: Path) -> None:
    script = [f"{ROOT}/launch/slurm.sbatch", *FLAGS, "--backend", "horovod", "--zero_stage", "1"]
    env = SITE | {"MPI": "pmix"}
    job = testbed.submit("--nodes=4", *script, "--out", "run", cwd=folder, env=env)
    state = testbed.wait(job, timeout=400)
    assert state == "COMPLETED", (folder / f"slurm-{job}.out").read_text()


WAYS = {  # and on how many nodes
    by_the_script_over_gloo: 8,
    by_horovodrun_over_mpi: 8,
    by_slurm_over_mpi_and_sharded: 4,
}


@pytest.mark.parametrize("way", WAYS)
def test_horovod_on_many_nodes_gives_the_weights_of_one_process(way, alone, testbed, tmp_path):
    way(testbed, tmp_path)
    summary = (tmp_path / "run" / "summary.json").read_text()
    assert f'"world_size": {WAYS[way]}' in summary and '"backend": "horovod"' in summary
    assert differs(tmp_path / "run", alone) < TOLERANCE
