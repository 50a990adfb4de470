"""What must not decide how a run rounds, since it differs between a run and its continuation."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import torch
from dist_looksam.run import train

torch.set_num_threads(1)
flags = "--data digits --model vit_8 --steps 1 --batch_size 8 --workers 0 --device cpu --out"
assert train.main([*flags.split(), OUT]) == 0


def somewhere_else(x, entries):
    return torch.empty(len(x) + 16)[entries : entries + len(x)].copy_(x)


x, y = torch.randn(2, 91, generator=torch.Generator().manual_seed(0))
sums = [torch.dot(somewhere_else(x, i), somewhere_else(y, 3 * i % 16)) for i in range(16)]
print(len({float(each) for each in sums}))
"""


def test_sums_do_not_depend_on_where_in_memory_tensors_lie(tmp_path):
    """MKL once added the products of a sum in an order that followed the address: the gradients of
    the first step after a resume lie elsewhere, and rounding differed in the last bit."""
    program = PROGRAM.replace("OUT]", f"{str(tmp_path / 'run')!r}]")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "1"
