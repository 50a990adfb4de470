"""Runs that are killed again and again until they are through: what the campaigns share."""

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dist_looksam import models
from dist_looksam.record import rundir

STEPS = 30
# Fine-tuning from weights, with all that is done to images; {weights} is a file, see `write_start`.
TUNED = "--init {weights} --freeze patch_embed|blocks.0.fc1 --layer_decay 0.7 --head_lr 2 --ema 0.9"
TUNED += " --augment crop,3augment,jitter,erasing,mixup,cutmix,repeat:3 --mixup_until 0.6"
BCE, BALANCED = "--loss bce --bce_target_thresh 0.2", "--class_weights balanced"
TIMES = ("seconds", "images_per_s", "mfu", "peak_memory")


def newest(out: Path) -> int:
    """Steps of the newest checkpoint; 0 for none."""
    names = [p.name[5:] for p in out.glob("checkpoints/step-*")]
    return max((int(n) for n in names if n.isdigit()), default=0)


def being_written(out: Path) -> bool:
    """Whether a checkpoint is begun and not yet whole."""
    return any(out.glob("checkpoints/.step-*"))


def metrics(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def write_start(folder: Path) -> Path:
    """The weights that TUNED starts from, of other classes than digits has."""
    torch.manual_seed(1)
    model = models.create("vit_8", num_classes=7, image_shape=(1, 8, 8))
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def differences(whole: Path, out: Path) -> list[str]:
    found = []
    for name in (rundir.WEIGHTS, rundir.WEIGHTS_EMA):
        if (whole / name).exists():
            a, b = (load_file(p / name) for p in (whole, out))
            found += [f"{n} of {name}" for n in a if not torch.equal(a[n], b[n])]
    if metrics(whole) != metrics(out):
        found.append("metrics.jsonl")
    one, two = (json.loads((p / "summary.json").read_text()) for p in (whole, out))
    found += [n for n in one if n not in TIMES and one[n] != two[n]]
    return found


def campaign(
    parser: argparse.ArgumentParser,
    cases: Callable[[argparse.Namespace], list],
    survive: Callable[[argparse.Namespace, Any, Path, int, random.Random], dict],
) -> int:
    """survive(asked, case, folder, kills, draw) for all cases, a line each. The exit code."""
    parser.add_argument("--kills", type=int, help="over all cases together; default one for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose words contain this")
    parser.add_argument("--part", default="1/1", help="2/5: the second of five parts of all cases")
    asked = parser.parse_args()
    every = [c for c in cases(asked) if asked.only in _words(c)]
    kills = asked.kills or len(every)
    random.Random(asked.seed).shuffle(every)
    chosen = every[:kills]
    part, parts = map(int, asked.part.split("/"))
    total, writing, bad, done = 0, 0, 0, 0
    for number, case in enumerate(chosen):
        if number % parts != part - 1:
            continue
        share = kills // len(chosen) + (number < kills % len(chosen))
        draw = random.Random(f"{asked.seed} {case}")
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = survive(asked, case, Path(folder), share, draw)
            except AssertionError:
                print(_words(case), *(p.read_text()[-4000:] for p in Path(folder).glob("*.log")))
                raise
        total, writing = total + report["kills"], writing + report["while_writing"]
        bad, done = bad + bool(report["differences"]), done + 1
        print(_words(case), json.dumps(report), flush=True)
    print(f"{total} kills, {writing} while a checkpoint was being written, {done} cases, "
          f"{bad} differ")  # fmt: skip
    return 1 if bad else 0


def _words(case: tuple) -> str:
    return " ".join(map(str, case))
