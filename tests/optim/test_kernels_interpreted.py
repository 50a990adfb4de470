"""The tests of the Triton kernels, without a GPU: by Triton's interpreter, in a process of its own,
since whether kernels are interpreted is decided when they are loaded, for the whole process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = ("gpu/test_kernels.py", "gpu/test_kernel_counts.py", "optim/test_against_reference.py")
ON_LAMB = "test_every_method_on_every_base and float32 and lamb"


@pytest.mark.slow
@pytest.mark.needs("triton")
def test_kernels_agree_with_torch_and_the_reference_and_are_few():
    chosen = f"test_kernel or ({ON_LAMB})"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "interpreted"]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, [TESTS / "gpu", TESTS.parent])),
    }
    done = subprocess.run(
        [*command, "-k", chosen, *(str(TESTS / name) for name in FILES)],
        cwd=TESTS.parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert "passed" in last and "skipped" not in last, last
