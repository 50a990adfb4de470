"""The testbed itself: it is a cluster, it heals, and it leaves nothing behind."""

import subprocess
import time
from pathlib import Path

import pytest
from testbed import SCRIPTS, Cluster

pytestmark = pytest.mark.needs("slurm")


def test_a_batch_job_runs_on_eight_hosts_that_see_the_same_files(testbed, tmp_path):
    (tmp_path / "job.sbatch").write_text("#!/bin/bash\nsrun bash -c 'hostname > $(hostname)'\n")
    job = testbed.submit("--nodes=8", "--ntasks-per-node=1", "job.sbatch", cwd=tmp_path)
    assert testbed.wait(job) == "COMPLETED"
    nodes = {f"node{i}" for i in range(1, 9)}
    assert {p.name for p in tmp_path.glob("node*")} == nodes
    assert {p.read_text().strip() for p in tmp_path.glob("node*")} == nodes


def test_a_host_that_lost_power_comes_back(testbed):
    testbed.fault("powercut", "node2")
    assert testbed.script("on.sh", "node2", "true").returncode != 0
    testbed.up()
    assert testbed.on("head", "ssh", "node2", "hostname").strip() == "node2"


def test_a_testbed_whose_owner_is_gone_takes_itself_down():
    """A test run that is killed cannot clean up; seventeen daemons would stay for good."""
    small = Cluster(name="pytest-orphan", nodes=1)
    owner = subprocess.Popen(["sleep", "600"])
    try:
        settings = {"TESTBED_NAME": small.name, "TESTBED_NODES": "1"}
        up = subprocess.run(
            [SCRIPTS / "up.sh"],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", **settings}
            | {"TESTBED_OWNER": str(owner.pid)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert up.returncode == 0, up.stderr
        owner.kill()
        owner.wait()
        end = time.monotonic() + 20
        while Path("/tmp/looksam-testbed-pytest-orphan").exists() and time.monotonic() < end:
            time.sleep(0.2)
        assert not list(Path("/run/netns").glob("looksam-pytest-orphan*"))
        assert not Path("/tmp/looksam-testbed-pytest-orphan").exists()
    finally:
        owner.kill()
        small.down()
