"""`dist-looksam plan` says how long steps take over cables of two speeds, before they are taken.

Two nodes, one thread each. The network is calibrated over the faster cable; the slower one is known
by its rate alone, of which it is taken to reach the same share. Over the faster a step mostly
computes, over the slower it mostly waits.
"""

import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from test_launch import ROOT
from testbed import Cluster

from dist_looksam.cli import main as cli

pytestmark = [
    pytest.mark.needs("slurm", "deepspeed", "fashion_mnist"),
    pytest.mark.timeout(900),
    pytest.mark.alone,
]

FLAGS = shlex.split(
    "--data fashion_mnist --model vit_28 --optimizer look_layer_sam --k 2 --batch_size 512 "
    "--micro_batch 256"
)
MBIT = {"fast": 200, "slow": 30}
BACKENDS = {"ddp": [], "zero": ["--zero_stage", "2"]}
WITHIN = 0.25


def start(testbed: Cluster, folder: Path, rank: int) -> str:
    env = {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "node1", "MASTER_PORT": "29611", "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    worker = Path(__file__).with_name("plan_time_worker.py")
    line = [sys.executable, str(worker), str(folder), *FLAGS, "--backend", "ddp"]
    return testbed.on(f"node{rank + 1}", *line, cwd=folder, env=env, timeout=600)


@pytest.fixture(scope="module")
def measured(session_testbed, tmp_path_factory):
    """{"fast", "slow"}: what the ranks measured over each cable."""
    folder, found = tmp_path_factory.mktemp("plan-time"), {}
    session_testbed.up()
    with ThreadPoolExecutor(2) as both:
        running = [both.submit(start, session_testbed, folder, rank) for rank in (0, 1)]
        try:
            for name, rate in MBIT.items():
                session_testbed.fault("slow", "node2", f"rate_mbit={rate}")
                (folder / name).touch()
                while not (folder / f"{name}.json").exists():
                    over = next((r for r in running if r.done()), None)
                    assert over is None or over.result() is None
                    time.sleep(0.2)
                found[name] = json.loads((folder / f"{name}.json").read_text())
            for rank in running:
                rank.result()
        finally:
            session_testbed.fault("fast", "node2")
    return found


@pytest.fixture
def plan(measured, tmp_path, capsys):
    """plan(backend, cable) -> the command's JSON."""

    def of(backend: str, cable: str) -> dict:
        machine = {"device": measured[cable]["device"], "network": measured["fast"]["network"]}
        (tmp_path / "machine.yaml").write_text(yaml.safe_dump(machine))
        own = ["--gpus", "2", "--gpus_per_node", "1", "--machine", str(tmp_path / "machine.yaml")]
        if cable == "slow":
            share = machine["network"]["bandwidth"] / MBIT["fast"]  # of a cable's rate is reached
            own += ["--bandwidth", str(8e-9 * share * MBIT["slow"])]
        assert cli.main(["plan", *FLAGS, *BACKENDS[backend], *own, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return of


@pytest.mark.parametrize("cable", MBIT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_takes_what_was_planned(measured, plan, backend, cable):
    wanted = plan(backend, cable)
    took = measured[cable]["medians"][backend]
    print(
        f"{backend} {MBIT[cable]} Mbit/s: planned {wanted['step_seconds']:.3f} s, took {took:.3f}"
    )
    print(wanted["times"]["mean"], measured[cable]["times"][backend], measured[cable]["gflops"])
    print({k: v for k, v in measured["fast"]["network"].items() if k != "source"})
    assert wanted["step_seconds"] == pytest.approx(took, rel=WITHIN)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_slower_cable_is_what_takes_most_of_its_step(measured, plan, backend):
    """Or the test above would hold with no model of the network at all."""
    fast, slow = (plan(backend, cable)["times"]["mean"] for cable in ("fast", "slow"))
    assert fast["compute"] > fast["exposed"] and slow["compute"] < slow["exposed"]
    assert measured["slow"]["medians"][backend] > 1.6 * measured["fast"]["medians"][backend]
