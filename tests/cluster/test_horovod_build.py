"""What cluster/horovod/build.sh built: both controllers, and an all-reduce by each."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("horovod", "mpi")

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
