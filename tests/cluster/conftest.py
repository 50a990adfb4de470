"""The cluster of the tests here: eight nodes, up once per session and down at its end."""

import os

import pytest
from testbed import Cluster


@pytest.fixture(scope="session")
def session_testbed(needs, tmp_path_factory):
    needs("slurm")
    share = str(tmp_path_factory.getbasetemp())
    cluster = Cluster(name=f"pytest-{os.getpid()}", share=share)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """What every way to start test_launch's run on many nodes must give: the run of one process."""
    from test_launch import FLAGS, run_plain

    return run_plain(tmp_path_factory.mktemp("alone") / "run", *FLAGS)


@pytest.fixture
def testbed(session_testbed):
    """The session's testbed, whole at the start of each test: no jobs, no lost hosts."""
    yield session_testbed
    session_testbed.up()
    session_testbed.on("head", "scancel", "--user=root", check=False)
