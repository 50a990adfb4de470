"""torchrun --max_restarts: what a failed start has left in the agent's store is not read again."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import environment

ROOT = Path(__file__).parents[2]
RANK = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from dist_looksam.world import World
from dist_looksam.world.roster import Roster

world, start = World.from_env(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if sys.argv[1] == "early" and start < 3 and world.rank == start % world.size:
    os._exit(3)  # before it meets the others
roster = Roster(world, timeout=20)
dist.init_process_group("gloo", store=dist.PrefixStore("group", roster.store), rank=world.rank,
                        world_size=world.size, timeout=timedelta(seconds=20))
with roster:
    for step in range(20):
        total = torch.ones(1)
        dist.all_reduce(total)
        assert float(total) == world.size
        if sys.argv[1] == "late" and start < 8 and world.rank == start % world.size and step == 5:
            os._exit(3)
os.write(1, f"done {world.rank} {start}\\n".encode())  # at once, beside the other rank's
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("how", "starts"), [("late", 8), ("early", 3)])
def test_every_restart_of_torchrun_meets_and_goes_on(tmp_path, how, starts):
    """Of eight restarts four ended in `connectFullMesh failed` and one did not end: the new ranks
    read the addresses and the verdict of those that had died. With `early`, some ranks had met the
    store one time more often than others."""
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    command = f"-m torch.distributed.run --standalone --nproc_per_node 2 --max_restarts {starts}"
    done = subprocess.run(
        [sys.executable, *command.split(), str(program), how],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split("\n")[:2]) == [f"done {rank} {starts}" for rank in range(2)]
    assert "connectFullMesh" not in done.stderr and "lost rank" not in done.stderr


def test_agents_of_two_nodes_restart_though_each_counts_its_own_failures(tmp_path):
    """Only the agent whose rank died counts the restart, so that TORCHELASTIC_RESTART_COUNT, as the
    name of a start, would keep the two nodes apart."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    program = tmp_path / "rank.py"
    once = 'os.environ.get("FAILS") and start < 1 and step == 5'
    program.write_text(
        RANK.replace(RANK[RANK.index('sys.argv[1] == "late"') :].split(":")[0], once)
    )
    command = (
        f"-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --max_restarts 3 --rdzv_id a "
        f"--rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port} --local_addr 127.0.0.1"
    )
    agents = []
    for node in range(2):
        with open(tmp_path / f"node{node}.txt", "w") as said:  # a pipe that nobody reads would fill
            agents.append(
                subprocess.Popen(
                    [sys.executable, *command.split(), str(program), "two"],
                    env=environment(**({"FAILS": "1"} if node else {})),
                    stdout=said,
                    stderr=said,
                )
            )
    end = time.monotonic() + 290  # 25 s on a quiet machine
    while time.monotonic() < end and any(agent.poll() is None for agent in agents):
        time.sleep(0.2)
    codes = [agent.poll() for agent in agents]
    for agent in agents:
        agent.kill()
        agent.wait()
    said = [(tmp_path / f"node{node}.txt").read_text() for node in range(2)]
    assert codes == [0, 0], "\n\n".join(said)
    counts = [re.search(r"^done \d (\d)$", text, re.MULTILINE)[1] for text in said]
    assert sorted(counts) == ["0", "1"]
