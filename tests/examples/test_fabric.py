"""examples/fabric_engine.py as it is written, on two ranks, against Engine in one process."""

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_looksam import restore

pytestmark = [pytest.mark.slow, pytest.mark.needs("lightning")]

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "fabric_engine.py"


def test_two_ranks_of_fabric_train_to_engines_weights(tmp_path):
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    flags = ["--accelerator", "cpu", "--devices", "2", "--precision", "fp32"]
    command = [sys.executable, str(EXAMPLE), *flags]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("loss") == 3, "one rank prints"

    example = argparse.Namespace(**runpy.run_path(str(EXAMPLE)))
    engine, found = (example.engine_of(torch.device("cpu"), "fp32") for _ in range(2))
    assert restore(found, tmp_path / "checkpoints").step == 30
    images, labels = example.samples().tensors
    for step in range(30):
        first = step % 10 * example.BATCH
        few = slice(first, first + example.BATCH)
        engine.step([(images[few], labels[few])])
    for got, want in zip(found.module.parameters(), engine.module.parameters(), strict=True):
        assert torch.allclose(got, want, rtol=0, atol=2e-5)
