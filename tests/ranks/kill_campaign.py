"""SIGKILL at random moments, then --resume auto, until the run is through: is it the same run?

    python tests/ranks/kill_campaign.py --kills 100

For each case one run without interruption, then runs that are killed again and again. Weights must
be bit-identical, and so must metrics.jsonl but for its times. Processes are forked from this one,
which has imported everything, so that a start takes a tenth of a second and not ten.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from dist_looksam import fit
from dist_looksam.optim.table import BASES, METHODS

STEPS = 30
TIMES = ("seconds", "images_per_s")
ARGUMENTS = f"--data digits --model vit_8 --steps {STEPS} --batch_size 24 --k 5 --workers 0 "
ARGUMENTS += "--save_every 1 --keep 3 --eval_every 10 --device cpu"
PLAIN = [
    ("plain", 1, f"--optimizer {n} --base {b}")
    for n, m in METHODS.items()
    for b in BASES
    if m.ascent or m.base == b
]
SEVERAL = [
    ("ddp", 2, "--optimizer look_layer_sam"),
    ("ddp", 2, "--optimizer look_sam --base sgd --precision bf16"),
    *(("zero", 2, f"--optimizer look_layer_sam --zero_stage {s}") for s in range(4)),
    *(("zero", 2, f"--optimizer look_sam --zero_stage {s} --precision bf16") for s in (1, 2, 3)),
    ("zero", 2, "--optimizer look_sam --zero_stage 2 --precision fp16"),
    ("zero", 3, "--optimizer look_sam --base adamw --zero_stage 2"),
    ("plain", 1, "--optimizer look_sam --precision fp16"),
    ("plain", 1, "--optimizer look_layer_sam --precision bf16"),
]


def start(case: tuple[str, int, str], out: Path) -> list[int]:
    """Fork the ranks of a run; their process ids."""
    backend, ranks, more = case
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv = [*ARGUMENTS.split(), *more.split(), "--backend", backend, "--out", str(out)]
    argv += ["--resume", "auto"]
    return [_fork(argv, rank, ranks, port, out) for rank in range(ranks)]


def _fork(argv: list[str], rank: int, ranks: int, port: int, out: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        code = fit.main(argv)
    finally:
        sys.stdout.flush()
        os._exit(code)


def newest(out: Path) -> int:
    """Steps of the newest checkpoint; 0 for none."""
    names = [p.name[5:] for p in out.glob("checkpoints/step-*")]
    return max((int(n) for n in names if n.isdigit()), default=0)


def finish(children: list[int], until: Callable[[], bool]) -> bool:
    """True if all ended by themselves before `until` came true; else they are killed."""
    left = list(children)
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                assert os.waitstatus_to_exitcode(status) == 0, f"rank ended with {status}"
        if left and until():
            for child in left:
                os.kill(child, signal.SIGKILL)
            for child in left:
                os.waitpid(child, 0)
            return False
        time.sleep(0.002)
    return True


def metrics(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def differences(whole: Path, out: Path) -> list[str]:
    found = []
    a, b = (load_file(p / "model.safetensors") for p in (whole, out))
    found += [f"weights of {n}" for n in a if not torch.equal(a[n], b[n])]
    if metrics(whole) != metrics(out):
        found.append("metrics.jsonl")
    one, two = (json.loads((p / "summary.json").read_text()) for p in (whole, out))
    found += [n for n in one if n not in TIMES and one[n] != two[n]]
    return found


def _knife(out: Path, draw: random.Random) -> Callable[[], bool]:
    """True some moment after a few more checkpoints: counted in steps, as machines differ."""
    first = newest(out)
    step = first + draw.randint(1, max(1, (STEPS - first) // 3))
    delay = draw.uniform(0.0, 0.15)
    seen: list[float] = []

    def due() -> bool:
        if not seen and newest(out) >= step:
            seen.append(time.monotonic() + delay)
        return bool(seen) and time.monotonic() >= seen[0]

    return due


def survive(case: tuple[str, int, str], folder: Path, kills: int, draw: random.Random) -> dict:
    """One case, killed `kills` times; what happened."""
    whole, out = folder / "whole", folder / "killed"
    assert finish(start(case, whole), lambda: False)
    report = {"kills": 0, "while_writing": 0, "resumed_at": []}
    while True:
        knife = _knife(out, draw) if report["kills"] < kills else lambda: False
        if finish(start(case, out), knife):
            if report["kills"] >= kills:
                break
            shutil.rmtree(out)  # it was faster than the knife: once more
            continue
        report["kills"] += 1
        report["while_writing"] += bool(list(out.glob("checkpoints/.step-*")))
        report["resumed_at"].append(newest(out))
    report["differences"] = differences(whole, out)
    for path in folder.glob("killed*"):
        if path.is_dir():
            shutil.rmtree(path)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="over all cases together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose words contain this")
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    every = [c for c in [*SEVERAL, *PLAIN] if asked.only in " ".join(map(str, c))]
    draw.shuffle(every)
    cases = every[: asked.kills]
    total, writing, bad = 0, 0, 0
    for number, case in enumerate(cases):
        share = asked.kills // len(cases) + (number < asked.kills % len(cases))
        with tempfile.TemporaryDirectory() as folder:
            report = survive(case, Path(folder), share, draw)
        total, writing = total + report["kills"], writing + report["while_writing"]
        bad += bool(report["differences"])
        print(*case, json.dumps(report), flush=True)
    print(f"{total} kills, {writing} while a checkpoint was being written, {len(cases)} cases, "
          f"{bad} differ")  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
