"""The tests of the Triton kernels, without a GPU: by Triton's interpreter, in a process of its own,
since whether kernels are interpreted is decided when they are loaded, for the whole process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def interpreted(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.needs("triton")
@pytest.mark.parametrize("name", ["test_kernels.py", "test_kernel_counts.py"])
def test_kernels_agree_with_torch_and_are_few(name):
    last = interpreted(str(TESTS / "gpu" / name))
    assert "passed" in last and "skipped" not in last, last


@pytest.mark.slow
@pytest.mark.needs("triton")
def test_steps_by_kernels_are_those_of_the_reference():
    only = "test_every_method_on_every_base and float32 and lamb"
    assert "passed" in interpreted(str(TESTS / "optim" / "test_against_reference.py"), "-k", only)
