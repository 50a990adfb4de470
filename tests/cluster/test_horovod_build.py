"""cluster/horovod/build.sh: what it says, and what it built: both controllers, each adding."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("horovod", "mpi")

ROOT = Path(__file__).parents[2]
TOOLS = (
    "bash",
    "dirname",
    "cat",
    "env",
    "sort",
    "grep",
    "sha256sum",
    "awk",
    "mkdir",
    "rm",
    "flock",
)

RANKS_SUMMED = """
import torch, horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.full((3,), 1.0 + hvd.rank()), op=hvd.Sum)
print(f"rank {hvd.rank()} of {hvd.size()}: {total.tolist()}", flush=True)
"""
HOROVODRUN = str(Path(sys.executable).with_name("horovodrun"))
LAUNCHERS = {
    "gloo": f"{HOROVODRUN} --gloo --network-interfaces lo -np 2",
    "mpi": "mpirun --allow-run-as-root --bind-to none --mca btl_tcp_if_include lo "
    "--mca oob_tcp_if_include lo -np 2",
}


def test_it_has_torch_and_both_controllers():
    told = subprocess.run(
        [HOROVODRUN, "--check-build"], capture_output=True, text=True, timeout=180
    )
    for part in ("[X] PyTorch", "[X] MPI", "[X] Gloo"):
        assert part in told.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_sum(launcher, tmp_path):
    program = tmp_path / "ranks_summed.py"
    program.write_text(RANKS_SUMMED)
    told = subprocess.run(
        [*LAUNCHERS[launcher].split(), sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    for rank in (0, 1):
        assert f"rank {rank} of 2: [3.0, 3.0, 3.0]" in told.stdout, told.stderr


def test_the_second_time_takes_seconds_and_says_nothing():
    began = time.monotonic()
    told = subprocess.run(
        ["bash", str(ROOT / "cluster" / "horovod" / "build.sh")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
    assert time.monotonic() - began < 30  # on a busy machine


@pytest.mark.parametrize("missing", ["g++", "mpicxx"])
def test_a_missing_compiler_or_mpi_is_one_sentence(tmp_path, missing):
    """In a project of its own, which has no wheel yet and this machine's Python as its own."""
    script, programs = tmp_path / "cluster/horovod/build.sh", tmp_path / "bin"
    for folder in (script.parent, programs, tmp_path / ".venv/bin"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "cluster/horovod/build.sh", script)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for tool in {*TOOLS, "g++", "make", "cmake", "mpicxx"} - {missing}:
        found = shutil.which(tool, path="/usr/bin:/bin:" + os.environ["PATH"])
        assert found, f"{tool} is not on this machine"
        (programs / tool).symlink_to(found)
    told = subprocess.run(
        [str(programs / "bash"), str(script), "wheel"],
        env={"PATH": str(programs), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.returncode == 2
    assert told.stderr.startswith(f"horovod: cannot build without {missing}: install")
    assert told.stderr.count("\n") == 1 and "Traceback" not in told.stdout
