"""SIGKILL at random moments, then --resume auto, until the run is through: is it the same run?

    python tests/ranks/kill_campaign.py                     # every case once
    python tests/ranks/kill_campaign.py --kills 4 --short   # four cases, as in CI

For each case one run without interruption, then runs that are killed again and again. Weights must
be bit-identical, and so must metrics.jsonl but for its times. Processes are forked from this one,
which has imported everything, so that a start takes a tenth of a second and not ten.
"""

import argparse
import random
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forks
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

from dist_looksam.optim.table import BASES, METHODS
from dist_looksam.run import train
from dist_looksam.settings.fields import PRECISIONS

ARGUMENTS = f"--data digits --model vit_8 --steps {STEPS} --batch_size 24 --k 5 --workers 0 "
ARGUMENTS += "--save_every 1 --keep 3 --eval_every 10 --device cpu"
PLACES = [("plain", 1, ""), ("ddp", 2, ""), ("fsdp2", 2, "")]
PLACES += [("zero", 2, f" --zero_stage {stage}") for stage in range(4)]
SHORTER, EXTENDED = 20, 12  # a run of so many steps is extended from its checkpoint of step 12
ALL_AT_ONCE = [
    (where, ranks, f"{how} {TUNED}{stage}")
    for how in (f"--optimizer look_layer_sam {BCE} --extend", f"--optimizer msam {BALANCED}",
                f"--optimizer look_sam --precision bf16 {BALANCED} --extend")
    for where, ranks, stage in (*PLACES, ("fsdp2", 3, ""), ("zero", 3, " --zero_stage 3"))
]  # fmt: skip
CASES = [
    # Every optimizer in every precision in every place (DeepSpeed has no fp16 at stage 0); on every
    # base; on more than two ranks.
    *((where, ranks, f"--optimizer {name} --precision {precision}{stage}")
      for name in METHODS for precision in PRECISIONS for where, ranks, stage in PLACES
      if not (precision == "fp16" and stage.endswith("0"))),
    *(("plain", 1, f"--optimizer {name} --base {base}")
      for name, m in METHODS.items() for base in BASES if m.ascent and base != m.base),
    ("ddp", 3, "--optimizer look_layer_sam"),
    *(("zero", 3, f"--optimizer look_sam --base adamw --zero_stage {s}") for s in (2, 3)),
    *(("fsdp2", 3, f"--optimizer {n}") for n in ("look_sam", "look_layer_sam")),
    *(("zero", 2, f"--optimizer look_layer_sam --micro_batch 6 --m {m} --zero_stage {s}{p}")
      for s, m, p in ((0, 6, ""), (1, 6, ""), (2, 12, " --precision fp16"), (3, 12, ""))),
    # --k 3: among 24 samples a step many groups and looks.
    *((where, ranks, f"--optimizer {o} --k 3 --micro_batch {24 // ranks // 2} {how}{more}")
      for where, ranks, group, more in (("ddp", 2, 6, ""), ("ddp", 3, 4, ""), ("fsdp2", 2, 12, ""),
                                        ("fsdp2", 4, 6, " --shard_ranks 2"))
      for o, how in (("look_layer_sam", f"--group {group}"), ("gsam", f"--group {group}"),
                     ("look_sam", "--looks adaptive --look_from 4"), ("msam", "--perturb norms"),
                     ("look_sam", "--rho_schedule linear --rho_end 2 --look_until 0.8"),
                     ("look_sam", f"--perturb norms --looks adaptive --group {group}"))),
    *ALL_AT_ONCE,
]  # fmt: skip
SHORT = [
    ("ddp", 2, "--optimizer look_layer_sam"),
    ("plain", 1, f"--optimizer msam {BALANCED} {TUNED}"),
    ("zero", 2, f"--optimizer look_sam --base adamw {BCE} --extend {TUNED} --zero_stage 2"),
    ("fsdp2", 2, f"--optimizer look_layer_sam {BALANCED} {TUNED}"),
]


def start(case: tuple[str, int, str], out: Path) -> list[int]:
    """Fork the ranks of a run; their process ids."""
    backend, ranks, more = case
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv = [*ARGUMENTS.split(), *more.format(weights=out.parent / "weights.safetensors").split()]
    argv += ["--backend", backend, "--out", str(out), "--resume"]
    begins = "--extend" in more and not newest(out)
    argv.append(str(_first(out) / "checkpoints" / f"step-{EXTENDED}") if begins else "auto")
    log = Path(f"{out}.log")
    if ranks == 1:
        return [forks.fork(lambda: train.main(argv), log)]
    return [
        forks.fork(lambda: train.main(argv), log, **forks.place(rank, ranks), MASTER_PORT=port)
        for rank in range(ranks)
    ]


def _first(out: Path) -> Path:
    """The run that is extended to `out`."""
    return out.parent / "first"


def _knife(out: Path, first: int, draw: random.Random) -> Callable[[], bool]:
    """True some moment after a few more checkpoints: counted in steps, as machines differ. Every
    second time while one is being written, which on a busy machine is seldom. first: where the run
    begins or goes on."""
    step = first + draw.randint(1, max(1, (STEPS - first) // 3))
    delay, writing = draw.uniform(0.0, 0.15), draw.random() < 0.5
    seen: list[float] = []

    def due() -> bool:
        if not seen and newest(out) >= step:
            seen.append(time.monotonic() + delay)
        if not seen or time.monotonic() < seen[0]:
            return False
        return not writing or being_written(out)

    return due


def survive(case: tuple[str, int, str], folder: Path, kills: int, draw: random.Random) -> dict:
    """One case, killed `kills` times; what happened."""
    whole, out = folder / "whole", folder / "killed"
    write_start(folder)
    begins = EXTENDED if "--extend" in case[2] else 0
    if begins:
        shorter = case[2].replace("--extend", f"--steps {SHORTER} --keep 0")
        assert forks.finish(start((*case[:2], shorter), _first(out)))
    assert forks.finish(start(case, whole))
    report = {"kills": 0, "while_writing": 0, "resumed_at": []}
    while True:
        first = newest(out) or begins
        knife = _knife(out, first, draw) if report["kills"] < kills else lambda: False
        if forks.finish(start(case, out), knife):
            if report["kills"] >= kills:
                break
            shutil.rmtree(out)  # it was faster than the knife: once more
            continue
        report["kills"] += 1
        report["while_writing"] += being_written(out)
        report["resumed_at"].append(newest(out))
    report["differences"] = differences(whole, out)
    for path in folder.glob("killed*"):
        if path.is_dir():
            shutil.rmtree(path)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="four cases alone, as in CI")
    return campaign(
        parser, lambda asked: SHORT if asked.short else CASES, lambda asked, *rest: survive(*rest)
    )


def prepare() -> None:
    """What all runs share, before they are forked."""
    torch.set_num_threads(1)
    deepspeed = forks.load_deepspeed()
    forks.share()
    # It asks for fast fp16; a CPU without it only takes longer.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True


if __name__ == "__main__":
    prepare()
    sys.exit(main())
