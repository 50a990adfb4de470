"""`dist-looksam flatness` on several ranks: samples are split, the numbers are the same."""

import json
import socket
import sys

import pytest

from dist_looksam.run.train import main as train
from launch import run

pytestmark = pytest.mark.slow
QUICK = [
    *("--samples", "96", "--test_samples", "50", "--group", "32", "--rho", "0.05", "--layer_rho"),
    *("0.002", "--iterations", "5", "--eigenvalues", "1", "--probes", "2", "--points", "3"),
    *("--precision", "fp64", "--device", "cpu", "--micro_batch", "20", "--timeout", "300"),
]


def numbers(content, at=()):
    """(place, number) of everything that was measured."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from numbers(value, (*at, name))
    elif isinstance(content, list):
        for place, value in enumerate(content):
            yield from numbers(value, (*at, place))
    elif isinstance(content, int | float):
        yield at, content


def test_two_and_four_ranks_measure_what_one_measures(tmp_path):
    """Three groups: one of four ranks has none. Equal to rounding of fp64 sums."""
    out = tmp_path / "run"
    flags = ["--data", "digits", "--optimizer", "adamw", "--steps", "3", "--device", "cpu"]
    assert train([*flags, "--out", str(out)]) == 0
    got = {}
    for ranks in (1, 2, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        command += ["--master_addr=127.0.0.1", f"--master_port={port}"]
        command += ["-m", "dist_looksam.cli.main", "flatness", str(out), *QUICK]
        run([*command, "--out", str(tmp_path / f"{ranks}")], 600, {})
        content = json.loads((tmp_path / f"{ranks}" / "flatness.json").read_text())["runs"][0]
        assert content["ranks"] == ranks
        measured = ("at_w", "ascent", "eigenvalues", "trace", "lines", "rounding")
        got[ranks] = dict(numbers({name: content[name] for name in measured}))
    assert len(got[1]) > 70
    for ranks in (2, 4):
        assert got[ranks] == pytest.approx(got[1], rel=1e-7, abs=1e-9)
