"""examples/timm_loop.py: a real timm model and data loader, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.needs("timm_aside")]

HERE = Path(__file__).parent


def test_a_timm_model_on_timms_loader_trains_as_by_a_closure(tmp_path):
    """timm is not on the path of other tests, nor is torchvision: see cluster/setup.sh."""
    path = f"{HERE.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "timm_worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "epoch 0: loss" in done.stdout
