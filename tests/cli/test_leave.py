"""A run that has done everything ends with exit code 0."""

import os
import resource
import signal
import subprocess
import sys

import pytest
from testbed import ROOT, until

from dist_looksam.cli import leave

pytestmark = pytest.mark.slow

# `late` stands for a gloo thread that was not given a core: it takes the interpreter's lock when
# that is going down, inside a C++ function that must not throw.
ENDING = """
import atexit, sys, threading, time
import torch, torch.distributed as dist
from dist_looksam.cli.leave import leave

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dist.group.WORLD  # as DDP holds it
dist.all_reduce(torch.ones(3))
dist.destroy_process_group()
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

def late():
    while True:
        store.set("beat", "1")

for _ in range(8):
    threading.Thread(target=late, daemon=True).start()
time.sleep(0.5)
atexit.register(print, "handlers ran")
sys.stdout.write("done, ")
{ending}
"""


def ended(ending: str) -> list[int]:
    program = ENDING.replace("{ending}", ending)
    done = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        for _ in range(4)
    ]
    assert all(d.stdout == "done, handlers ran\n" for d in done)
    return [d.returncode for d in done]


@pytest.mark.parametrize("code", [0, 2])
def test_a_process_with_gloo_threads_ends_with_its_own_exit_code(code):
    """Under load 2 of 7 two-rank runs ended with SIGABRT after their last line."""
    assert ended(f"leave({code})") == [code] * 4


def test_python_without_gloo_ends_as_ever():
    program = "from dist_looksam.cli.leave import leave; print('x'); leave(3)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout == "x\n"


@pytest.mark.parametrize("error", [FileNotFoundError, ProcessLookupError])
def test_a_thread_that_ends_while_it_is_looked_at_is_none(error, monkeypatch):
    """It was there when asked whether it exists, and gone when read: a traceback at the very end
    of a run that had done everything."""

    class Ending:
        def exists(self) -> bool:
            return True

        def read_text(self) -> str:
            raise error

    class Living(Ending):
        def read_text(self) -> str:
            return "pt_gloo_runloop\n"

    class Tasks:
        def __init__(self, path: str) -> None:
            assert path == "/proc/self/task"

        def glob(self, pattern: str) -> list[Ending]:
            return [Ending(), Living(), Ending()]

    monkeypatch.setattr(leave, "Path", Tasks)
    assert leave._gloo_threads() == 1


OVER_MPI = """
from mpi4py import MPI
import torch, torch.distributed as dist
from dist_looksam.cli.leave import leave

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dist.group.WORLD
dist.all_reduce(torch.ones(3))
leave(0)
"""


@pytest.mark.needs("mpi")
def test_a_rank_that_has_used_mpi_ends_it_for_mpirun_to_see():
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    env = {**os.environ}  # without what an MPI in this process, of another test, has set behind it
    done = subprocess.run(
        [*command, sys.executable, "-c", OVER_MPI],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
    )
    assert done.returncode == 0, done.stderr


def test_a_crash_in_a_library_says_where_python_was(tmp_path):
    """Without that a rank of a node of many ends with a number only."""
    flags = ["--data", "digits", "--workers", "0", "--steps", "99999", "--out", tmp_path / "run"]
    command = [sys.executable, ROOT / "train.py", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
    try:
        until((tmp_path / "run" / "metrics.jsonl").exists, 120)
        process.send_signal(signal.SIGSEGV)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGSEGV
    assert b"Segmentation fault" in said and b"train.py" in said
