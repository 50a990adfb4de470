"""A global batch of any size runs by accumulation in the memory of one micro-batch."""

import json
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MEASURED = f"""
import json, resource, sys
sys.path.insert(0, {str(ROOT)!r})
from dist_looksam.run.train import main
code = main(sys.argv[1:])
print(json.dumps([code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def peak_mb(batch: int, out: Path) -> float:
    """Largest resident size of one step, a look, so both passes."""
    flags = ["--data", "fashion_mnist", "--steps", "1", "--batch_size", str(batch)]
    flags += ["--micro_batch", "128", "--optimizer", "look_sam", "--holdout", "128"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *flags, "--out", str(out)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    code, kilobytes = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["forward_backward_passes"] == 2 and summary["batch_size"] == batch
    return kilobytes / 1024


@pytest.mark.needs("fashion_mnist")
def test_memory_hardly_grows_with_the_global_batch(tmp_path):
    """8 times the batch: the images themselves, one byte a pixel, and little else. A kept graph of
    a micro-batch is more than 100 MB, of all of them more than a GB."""
    assert resource.getpagesize()  # Linux: ru_maxrss is in kilobytes
    with ThreadPoolExecutor() as both:
        small, large = both.map(peak_mb, (256, 2048), (tmp_path / "small", tmp_path / "large"))
    pixels = 2048 * 28 * 28 / 2**20
    assert large - small < 3 * pixels + 40
