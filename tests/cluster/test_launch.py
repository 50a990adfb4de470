"""Every way to start train.py over eight nodes gives the weights of one process."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from testbed import ROOT, SITE, Cluster

pytestmark = pytest.mark.needs("slurm")

# eps: Adam and LAMB with the usual 1e-8 amplify rounding where a gradient is exactly zero.
FLAGS = shlex.split(
    "--optimizer look_layer_sam --data digits --model vit_8 --augment none --batch_size 48 "
    "--steps 5 --k 3 --eps 1e-4"
)
TOLERANCE = 2e-5  # the contract's for LAMB; summing 8 ranks' gradients rounds differently


def differs(run: Path, other: Path) -> float:
    """The largest difference between two runs' weights."""
    mine, theirs = (load_file(p / "model.safetensors") for p in (run, other))
    assert mine.keys() == theirs.keys()
    return max(float((mine[k] - theirs[k]).abs().max()) for k in mine)


def run_plain(out: Path, *flags: str) -> Path:
    """One process, no launcher."""
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


def hostfile(folder: Path) -> Path:
    path = folder / "hostfile"
    path.write_text("".join(f"node{i} slots=1\n" for i in range(1, 9)))
    return path


def by_deepspeed(testbed: Cluster, folder: Path) -> None:
    """The literal command of the README; pdsh carries no environment but by .deepspeed_env."""
    (folder / ".deepspeed_env").write_text(
        "GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n"
    )
    command = ["deepspeed", "--num_nodes", "8", "--hostfile", str(hostfile(folder))]
    env = {"PDSH_RCMD_TYPE": "ssh", "DS_ENV_FILE": str(folder / ".deepspeed_env")}
    env["PATH"] = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    said = testbed.on(
        "head", *command, str(ROOT / "train.py"), *FLAGS, "--out", str(folder / "run"),
        cwd=folder, env=env, timeout=400,
    )  # fmt: skip
    for node in range(1, 9):
        assert f"node{node}: " in said
    assert "backend zero" in said and "zero_stage: 2" in (folder / "run/config.yaml").read_text()


def by_sbatch(testbed: Cluster, folder: Path) -> None:
    script = f"{ROOT}/launch/slurm.sbatch"
    job = testbed.submit(
        "--nodes=8", script, *FLAGS, "--backend", "zero", "--out", "run", cwd=folder, env=SITE
    )
    state = testbed.wait(job, timeout=400)
    assert state == "COMPLETED", (folder / f"slurm-{job}.out").read_text()


def by_mpirun(testbed: Cluster, folder: Path) -> None:
    wires = "--mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0"
    env = SITE | {"HOSTFILE": str(hostfile(folder)), "MPI_FLAGS": wires}
    command = [f"{ROOT}/launch/mpi.sh", *FLAGS, "--out", str(folder / "run")]
    testbed.on("head", *command, cwd=folder, env=env, timeout=400)


def by_mpich(testbed: Cluster, folder: Path) -> None:
    """By the name Debian gives it beside Open MPI's."""
    env = SITE | {"HOSTFILE": str(hostfile(folder)), "MPIRUN": "mpirun.mpich"}
    command = [f"{ROOT}/launch/mpi.sh", *FLAGS, "--out", str(folder / "run")]
    said = testbed.on("head", *command, cwd=folder, env=env, timeout=400)
    assert "\n[0] top1 " in said  # MPICH's way to name the rank


def by_srun_pmix(testbed: Cluster, folder: Path) -> None:
    command = ["srun", "--mpi=pmix", "--nodes=8", f"{ROOT}/launch/rank.sh", *FLAGS, "--out", "run"]
    testbed.on("head", *command, cwd=folder, env=SITE, timeout=400)


def by_torchrun(testbed: Cluster, folder: Path) -> None:
    command = ["srun", "--nodes=8", f"{ROOT}/launch/torchrun.sh", *FLAGS, "--out", "run"]
    testbed.on("head", *command, cwd=folder, env=SITE | {"RANKS": "1"}, timeout=400)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "way", [by_deepspeed, by_sbatch, by_mpirun, by_mpich, by_srun_pmix, by_torchrun]
)
def test_eight_nodes_give_the_weights_of_one_process(way, alone, testbed, tmp_path, needs):
    if way in (by_deepspeed, by_sbatch):
        needs("deepspeed")
    way(testbed, tmp_path)
    assert '"world_size": 8' in (tmp_path / "run" / "summary.json").read_text()
    assert differs(tmp_path / "run", alone) < TOLERANCE


@pytest.mark.timeout(600)
def test_fsdp2_by_sbatch_gives_the_weights_of_one_process(alone, testbed, tmp_path):
    """Three nodes, which split the layers unevenly."""
    script = f"{ROOT}/launch/slurm.sbatch"
    flags = [*FLAGS, "--backend", "fsdp2", "--save_every", "2", "--out", "run"]
    job = testbed.submit("--nodes=3", script, *flags, cwd=tmp_path, env=SITE)
    state = testbed.wait(job, timeout=300)
    assert state == "COMPLETED", (tmp_path / f"slurm-{job}.out").read_text()
    said = (tmp_path / "run" / "summary.json").read_text()
    assert '"world_size": 3' in said and '"backend": "fsdp2"' in said
    assert differs(tmp_path / "run", alone) < TOLERANCE


def test_every_rank_says_what_it_sees_and_they_add(testbed, tmp_path):
    command = ["srun", "--nodes=3", sys.executable, "-m", "dist_looksam.world", "--megabytes", "1"]
    env = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    said = testbed.on("head", *command, cwd=tmp_path, env=env)
    for rank in range(3):
        assert f"rank {rank}/3  local 0/1  node {rank} (node{rank + 1})  master node1:" in said
    assert "all-reduce over 3 ranks: right" in said and "GB/s per rank" in said


def test_a_machine_that_does_not_answer_is_named_before_anything_is_started(testbed, tmp_path):
    """DeepSpeed asks the first machine only; the others' ranks then waited ten minutes for it."""
    testbed.fault("unplug", "node3")
    command = ["bash", f"{ROOT}/launch/deepspeed.sh", "--out", "run"]
    env = {"HOSTFILE": str(hostfile(tmp_path)), "NODES": "4"}
    said = testbed.on("head", *command, cwd=tmp_path, env=env, check=False)
    assert "got no answer from node3; try ssh node3 true" in said and said.count("\n") == 1
