"""SIGKILL of all ranks of a Horovod run at random moments, then --resume auto: is it the same run?

    python tests/ranks/horovod_kills.py                    # every case once, of forked ranks
    python tests/ranks/horovod_kills.py --kills 8 --by mpi # as a user starts it, over MPI

A case is a number of ranks, an optimizer, a precision, and whether the state is sharded. It runs
once without interruption, then killed again and again until it is through: weights must be
bit-identical, and metrics.jsonl but for its times. Three ranks are sharded, as else Horovod chooses
anew in which order it adds (docs/horovod.md).
"""

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import forks
import horovod_forks
import psutil
import torch
from campaign import (
    BALANCED,
    BCE,
    STEPS,
    TUNED,
    being_written,
    campaign,
    differences,
    newest,
    write_start,
)

from dist_looksam.optim.table import METHODS
from dist_looksam.run import train
from dist_looksam.settings.fields import PRECISIONS
from launch import HERE, HOROVOD, environment

FLAGS = f"--data digits --model vit_8 --steps {STEPS} --batch_size 24 --k 5 "
FLAGS += "--workers 0 --save_every 1 --keep 3 --eval_every 10 --device cpu --resume auto "
FLAGS += "--backend horovod"
TRAIN = str(HERE.parents[1] / "train.py")
CASES = [
    *((2, f"--optimizer {name} --precision {precision}{stage}")
      for name in METHODS for precision in PRECISIONS for stage in ("", " --zero_stage 1")),
    *((3, f"--optimizer {name} --zero_stage 1") for name in ("look_sam", "look_layer_sam")),
    *((2, f"--optimizer {name} {loss} {TUNED}{stage}")
      for name, loss in (("msam", BALANCED), ("look_layer_sam", BCE))
      for stage in ("", " --zero_stage 1")),
]  # fmt: skip
SHORT = [(2, "--optimizer look_layer_sam --precision fp32"), CASES[-1]]


class Horovodrun:
    """Ranks as a user starts them; what they say goes to OUT.log."""

    def __init__(self, ranks: int, flags: list[str], out: Path, by: str = "gloo") -> None:
        command = [*HOROVOD[by].split(), "-np", str(ranks), sys.executable, TRAIN, *flags]
        with open(f"{out}.log", "ab") as log:
            self.launcher = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)

    def ranks(self) -> list[psutil.Process]:
        """The processes that run train.py, not the shells around them."""
        found = []
        for process in psutil.Process(self.launcher.pid).children(recursive=True):
            try:
                if process.cmdline()[1:2] == [TRAIN]:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def code(self) -> int | None:
        """None while it runs."""
        return self.launcher.poll()


class Forked:
    """Ranks forked from here, where all is imported, with horovodrun's rendezvous server."""

    def __init__(self, ranks: int, flags: list[str], out: Path) -> None:
        work, log = partial(train.main, flags), Path(f"{out}.log")
        self.server, children = horovod_forks.start(ranks, work, log)
        self.children = [psutil.Process(child) for child in children]
        self.codes: dict[int, int] = {}

    def ranks(self) -> list[psutil.Process]:
        return [c for c in self.children if c.pid not in self.codes]

    def code(self) -> int | None:
        """None while it runs."""
        for child in self.ranks():
            done, status = os.waitpid(child.pid, os.WNOHANG)
            if done:
                self.codes[child.pid] = os.waitstatus_to_exitcode(status)
        if len(self.codes) < len(self.children):
            return None
        if self.server:
            self.server.stop()
            self.server = None
        return next((code for code in self.codes.values() if code), 0)


Start = Callable[[int, list[str], Path], Horovodrun | Forked]
STARTS: dict[str, Start] = {"forked": Forked} | {by: partial(Horovodrun, by=by) for by in HOROVOD}


def over(run: Horovodrun | Forked, seconds: float = 600) -> int:
    """Its exit code, when it has ended."""
    end = time.monotonic() + seconds
    while (code := run.code()) is None:
        assert time.monotonic() < end, f"not over after {seconds} s"
        time.sleep(0.01)
    return code


def killed(run: Horovodrun | Forked, count: int, out: Path, draw: random.Random) -> bool:
    """Kill all `count` ranks some moment after a few more checkpoints. False if it was through."""
    first = newest(out)
    step = first + draw.randint(1, max(1, (STEPS - first) // 3))
    while newest(out) < step:
        if (code := run.code()) is not None:
            assert code == 0, Path(f"{out}.log").read_text()[-4000:]
            return False
        time.sleep(0.02)
    time.sleep(draw.uniform(0.0, 0.15))
    ranks = run.ranks()
    for rank in ranks:
        rank.kill()
    code = over(run)
    assert len(ranks) == count or code == 0, f"{len(ranks)} ranks were there to kill"
    return code != 0


def survive(
    start: Start, case: tuple[int, str], folder: Path, kills: int, draw: random.Random
) -> dict:
    """One case killed `kills` times; what happened."""
    (ranks, more), whole, out = case, folder / "whole", folder / "killed"
    more = more.format(weights=write_start(folder))

    def begin(path: Path) -> Horovodrun | Forked:
        return start(ranks, [*FLAGS.split(), *more.split(), "--out", str(path)], path)

    assert over(begin(whole)) == 0, Path(f"{whole}.log").read_text()
    report: dict = {"kills": 0, "while_writing": 0, "resumed_at": []}
    while report["kills"] < kills:
        if newest(out) == STEPS or not killed(begin(out), ranks, out, draw):
            out.rename(folder / f"through-{time.monotonic_ns()}")  # once more, from the start
            continue
        report["kills"] += 1
        report["while_writing"] += being_written(out)
        report["resumed_at"].append(newest(out))
    assert over(begin(out)) == 0, Path(f"{out}.log").read_text()
    report["differences"] = differences(whole, out)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--by", choices=STARTS, default="forked")
    parser.add_argument("--short", action="store_true", help="two cases alone, as in CI")
    return campaign(
        parser,
        lambda asked: SHORT if asked.short else CASES,
        lambda asked, *rest: survive(STARTS[asked.by], *rest),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    forks.share()
    sys.exit(main())
