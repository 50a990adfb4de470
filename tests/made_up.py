"""Made-up runs and sweeps, as train.py and dist-looksam sweep leave them, for tests of reports."""

import json
import math
import random
import zlib
from pathlib import Path

import yaml

from dist_looksam.optim.table import METHODS

# label -> (method, passes a step, top1 at small batches, octave at which it bends, g_v ratio)
METHODS_OF_A_SWEEP = {
    "adamw": ("adamw", 1.0, 0.902, 4.0, None),
    "lamb": ("lamb", 1.0, 0.897, 4.8, None),
    "sam": ("sam", 2.0, 0.909, 4.6, 0.42),
    "look_sam (natural)": ("look_sam", 1.2, 0.907, 4.4, 0.38),
    "layer_sam": ("layer_sam", 2.0, 0.905, 5.6, 0.2),
    "look_layer_sam": ("look_layer_sam", 1.2, 0.904, 5.3, 0.17),
}
BATCHES = (192, 384, 768, 1536, 3072, 8192, 65536)


def run(
    folder: Path,
    method: str = "adamw",
    *,
    batch: int = 192,
    seed: int = 0,
    top1: float | None = 0.9,
    steps: int = 12,
    passes: float = 1.0,
    seconds: float = 10.0,
    ranks: int = 1,
    gv_ratio: float | None = None,
    skipped: int = 0,
    lost: bool = False,
    done: bool = True,
    started: float = 1.0,
    point: dict | None = None,
    **config,
) -> Path:
    """A run directory. `lost`: its last losses are not finite. `done` False: no summary.json."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"optimizer": method, "base": METHODS[method].base, "lr": 0.01, "rho": 0.02}
    settings |= {"k": 5, "batch_size": batch, "seed": seed, "data": "fashion_mnist"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"model": "vit_28"} | config))
    rows = (_row(t, steps, lost, skipped, gv_ratio) for t in range(steps))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "job.json").write_text(json.dumps({"started": started, "host": "node1"}))
    if point is not None:
        (folder / "point.json").write_text(json.dumps(point))
    if done:
        summary = {"top1": top1, "steps": steps, "seconds": seconds, "world_size": ranks}
        summary |= {"images_per_s": steps * batch / seconds, "optimizer": method}
        summary |= {"backend": "plain" if ranks == 1 else "ddp", "batch_size": batch}
        summary["forward_backward_passes"] = round(passes * steps)
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _row(t: int, steps: int, lost: bool, skipped: int, gv_ratio: float | None) -> dict:
    return {
        "step": t,
        "loss": None if lost and t > steps // 2 else 2 * math.exp(-t / steps),
        "look": gv_ratio is not None and t % 5 == 0,
        "skipped": t < skipped,
        "gv_ratio": gv_ratio and gv_ratio * (1 + 0.1 * math.sin(t)),
    }


def sweep(
    folder: Path, *, labels=METHODS_OF_A_SWEEP, batches=BATCHES, seeds=(0, 1, 2), trials=True
) -> Path:
    """A sweep: tuning trials (lr x rho) and final runs; accuracy bends down at large batches."""
    choices: dict = {}
    for label in labels:
        for batch in batches:
            if trials:
                choices.setdefault(label, {})[str(batch)] = _tuned(folder, label, batch)
            for seed in seeds:
                _final(folder, label, batch, seed)
    if trials:
        (folder / "choices.json").write_text(json.dumps(choices))
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"batches": list(batches)}))
    return folder


def _top1(label: str, batch: int, draw: random.Random) -> float:
    _, _, best, bend, _ = METHODS_OF_A_SWEEP[label]
    octave = math.log2(batch / 192)
    fall = 0.006 * octave + 0.5 / (1 + math.exp(-1.6 * (octave - bend - 2.2)))
    return max(0.1, best - fall + draw.gauss(0, 0.002 + 0.012 * fall))


def _draw(*seed: object) -> random.Random:
    return random.Random(zlib.crc32(repr(seed).encode()))


def _final(folder: Path, label: str, batch: int, seed: int) -> None:
    method, passes, _, _, ratio = METHODS_OF_A_SWEEP[label]
    draw, steps = _draw(label, batch, seed), max(5, 46080 // batch // 5 * 5)
    run(
        folder / "final" / f"{label}-{batch}-{seed}",
        method,
        batch=batch,
        seed=seed,
        top1=_top1(label, batch, draw),
        steps=steps,
        passes=passes,
        seconds=60 * passes * (1 + 40 / steps) * draw.uniform(0.97, 1.08),
        gv_ratio=ratio and ratio * (batch / 192) ** 0.2 * draw.uniform(0.9, 1.1),
        point={
            "method": method, "label": label, "stage": "final", "batch_size": batch, "seed": seed,
            "flags": {"lr": 0.002, "rho": 0.02} if ratio else {"lr": 0.002},
        },
    )  # fmt: skip


def _tuned(folder: Path, label: str, batch: int) -> dict:
    """The same six trials for each: three lr x two rho, or six lr."""
    method, passes, _, _, ratio = METHODS_OF_A_SWEEP[label]
    if ratio:
        grid = [{"lr": lr, "rho": rho} for lr in (0.001, 0.002, 0.004) for rho in (0.01, 0.02)]
    else:
        grid = [{"lr": lr} for lr in (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)]
    best, score = {}, -1.0
    for i, flags in enumerate(grid):
        draw = _draw(label, batch, i)
        top1 = _top1(label, batch, draw) - 0.02 * abs(math.log2(flags["lr"] / 0.002))
        run(
            folder / "tune" / f"{label}-{batch}-{i}",
            method,
            batch=batch,
            top1=top1,
            passes=passes,
            lr=flags["lr"],
            point={
                "method": method, "label": label, "stage": "tune", "batch_size": batch, "seed": 0,
                "flags": flags,
            },
        )  # fmt: skip
        if top1 > score:
            best, score = flags, top1
    return best | {"trials": len(grid), "score": score}
