"""`dist-looksam eval RUN|WEIGHTS`: scores of trained weights on the evaluation images.

Runs as one process or under the launchers of train.py; images are split over the ranks. Every rank
holds the whole model.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint, files, models
from ..backends.plain import PRECISION_DTYPES
from ..backends.ranks import gather
from ..cli.arguments import Parser
from ..cli.table import text as table_text
from ..data import Data, EvalLoader
from ..data.sets import SETS
from ..data.source import UNREADABLE
from ..errors import ConfigError, RunError
from ..flatness.trained import Trained, open_, open_weights
from ..maths import scores
from ..record.progress import Progress
from ..record.version import made_with
from ..settings import assemble
from ..settings.config import Settings
from ..settings.fields import DEVICES
from ..world import World
from ..world.roster import joined

FORMAT = 1
FILE, PICTURE = "eval.json", "confusion.png"
_GIVEN = {  # settings that replace those of the run: type, help
    "model": (str, "name of the model of weights that do not say it"),
    "data": (str, f"another data set, scored on all its evaluation images: {', '.join(SETS)}"),
    "data_dir": (str, "folder of the data"),
    "image_size": (int, "height and width of the images of a folder, in pixels"),
    "holdout": (int, "training images held out, which are then scored; 0: the test images"),
}


def main(argv: Sequence[str]) -> int:
    """Score, print, and with --out write eval.json and confusion.png. Raises ConfigError,
    RunError."""
    os.environ.setdefault("MKL_CBWR", "AUTO")  # as in train.py
    flags = _parser().parse_args(argv)
    if flags.micro_batch < 1:
        raise ConfigError(f"micro_batch must be >= 1, got {flags.micro_batch}.")
    world = World.from_env()
    trained = opened(flags, **{name: getattr(flags, name) for name in _GIVEN})
    device = assemble.device_of(Settings(device=flags.device), world)
    with joined(world, device, timeout=flags.timeout):
        found = evaluate(trained, world, device, micro_batch=flags.micro_batch)
    if world.rank == 0:
        _show(flags, found)
    return 0


def opened(flags: Any, **given: Any) -> Trained:
    """What `flags.weights_of` names: a run directory, or weights alone."""
    path, ema = flags.weights_of, flags.weights == "ema"
    if path.is_dir() and not (path / checkpoint.MANIFEST).is_file():
        return open_(path, step=flags.step, ema=ema, **given)
    if not path.exists():
        raise ConfigError(
            f"RUN must be a run directory, a checkpoint or a safetensors file, got {path}, which "
            f"does not exist; give what train.py --out wrote."
        )
    if flags.step is not None or (ema and path.is_file()):
        raise ConfigError(f"--step and --weights choose among the weights of a run, got {path}.")
    return open_weights(path, ema=ema, **given)


@torch.no_grad()
def evaluate(
    trained: Trained, world: World, device: torch.device, *, micro_batch: int
) -> dict[str, Any]:
    """The content of eval.json, on every rank. Collective: one object gather.

    In the arithmetic of the run's precision, as the run's own evaluations.
    """
    data = trained.data()
    model = trained.model(data).to(device).eval()
    loader = EvalLoader(
        data.test, micro_batch=micro_batch, rank=world.rank, ranks=world.size, pin=False
    )
    shown = world.rank == 0
    progress = Progress(len(loader), shown=shown, file=sys.stderr, unit="batch", facts=())
    sums, bins = torch.zeros(4, dtype=torch.float64), torch.zeros(3, scores.BINS).double()
    pairs = [torch.zeros(0, dtype=torch.int64)]  # true class x number of classes + answer
    try:
        with progress, arithmetic(trained, device):
            for number, batch in enumerate(loader, start=1):
                batch = batch.to(device)
                logits, labels = models.call(model, batch.images, None), batch.labels
                sums += scores.sums(logits, labels, ignore=UNREADABLE).cpu()
                bins += scores.bins(logits, labels, ignore=UNREADABLE).cpu()
                counted, answers = labels != UNREADABLE, logits.argmax(-1)
                pairs.append((labels * data.num_classes + answers)[counted].cpu())
                progress.update(number)
    finally:
        loader.close()
    mine = (sums, bins, torch.cat(pairs))
    parts = gather(mine) if world.size > 1 else [mine]
    all_sums, all_bins = (torch.stack([part[i] for part in parts]).sum(0) for i in (0, 1))
    found = _numbers(data, all_sums, all_bins, torch.cat([part[2] for part in parts]))
    return {**_facts(trained), **found, "ranks": world.size, "device": device.type, **made_with()}


def arithmetic(trained: Trained, device: torch.device) -> torch.autocast:
    """Inside, forward computes in the precision of the run."""
    dtype = PRECISION_DTYPES[trained.config["precision"]]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _facts(trained: Trained) -> dict[str, Any]:
    names = ("model", "data", "data_dir", "holdout", "precision", "optimizer", "batch_size", "seed")
    known = trained.config
    return {
        "format": FORMAT,
        "run": str(trained.path),
        "weights": str(trained.weights),
        "step": trained.step,
        "ema": trained.ema,
        **{name: known[name] for name in names},
    }


def _numbers(data: Data, sums: Tensor, bins: Tensor, pairs: Tensor) -> dict[str, Any]:
    right, right5, loss, count = sums.tolist()
    if not count:
        raise RunError("no evaluation image can be read; repair or remove them.")
    names, classes = data.train.class_names, []
    values, counts = pairs.unique(return_counts=True)
    rows: dict[int, dict[int, int]] = {}
    for value, number in zip(values.tolist(), counts.tolist(), strict=True):
        rows.setdefault(value // len(names), {})[value % len(names)] = number
    for true, name in enumerate(names):
        row = rows.get(true, {})
        images = sum(row.values())
        top1 = row.get(true, 0) / images if images else None
        answers = {names[answer]: n for answer, n in sorted(row.items(), key=lambda x: -x[1])}
        classes.append({"class": name, "images": images, "top1": top1, "answers": answers})
    return {
        "images": int(count),
        "unreadable": len(data.test) - int(count),
        "top1": right / count,
        "top5": right5 / count,
        "loss": loss / count if math.isfinite(loss) else None,
        "calibration_error": scores.calibration_error(bins) if math.isfinite(loss) else None,
        "classes": classes,
    }


def _show(flags: Any, found: dict[str, Any]) -> None:
    print(json.dumps(found, indent=1) if flags.json else _text(found))
    if flags.out is None:
        return
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
        files.replace_json(flags.out / FILE, found)
    except OSError as error:
        raise RunError(f"{flags.out / FILE} cannot be written ({error.strerror}).") from None
    lines = [str(flags.out / FILE)]
    try:
        from ..report import confusion, drawing

        lines.append(str(drawing.save_png(confusion.picture(found), flags.out / PICTURE)))
    except ConfigError as error:
        lines.append(f"{PICTURE} was not drawn: {error}")
    print(*lines, sep="\n", file=sys.stderr if flags.json else sys.stdout)


def _text(found: dict[str, Any]) -> str:
    rows = []
    for row in found["classes"]:
        wrong = [f"{name} {n}" for name, n in row["answers"].items() if name != row["class"]]
        top1 = "-" if row["top1"] is None else f"{row['top1']:.4f}"
        rows.append((row["class"], ", ".join(wrong[:3]), f"{row['images']:,}", top1))
    names = {"top1": "top1", "top5": "top5", "loss": "loss", "calibration_error": "ECE"}
    shown = ("nan" if found[key] is None else f"{found[key]:.4f}" for key in names)
    numbers = "  ".join(f"{name} {x}" for name, x in zip(names.values(), shown, strict=True))
    unreadable = f", {found['unreadable']:,} unreadable" if found["unreadable"] else ""
    averages = " (averages)" if found["ema"] else ""
    head = ("class", "mistaken for", "images", "top1")
    return (
        f"{found['weights']}{averages}: {found['images']:,} images of {found['data']}{unreadable}\n"
        f"{numbers}\n\n{table_text(head, rows, left=2)}"
    )


def choose_weights(parser: argparse.ArgumentParser) -> None:
    """The arguments that `opened` reads."""
    add = parser.add_argument
    text = "run directory (--out of train.py), checkpoint, or safetensors file"
    add("weights_of", metavar="RUN|WEIGHTS", type=Path, help=text)
    text = "of a run: those of the last step (raw, the default), or their averages (ema)"
    add("--weights", choices=("raw", "ema"), default="raw", help=text)
    add("--step", type=int, help="number of steps of a run's checkpoint; default: the end")
    add("--device", choices=DEVICES, default="auto", help="device to compute on; default auto")


def _parser() -> Parser:
    parser = Parser(
        prog="dist-looksam eval",
        description="Score trained weights on evaluation images: top1, top5, mean cross-entropy, "
        "expected calibration error (15 bins), accuracy and mistakes per class. Works under "
        "torchrun and the other launchers, with the same numbers.",
    )
    choose_weights(parser)
    add = parser.add_argument
    for name, (kind, text) in _GIVEN.items():
        add(f"--{name}", type=kind, help=f"{text}; default: as in the run")
    add("--out", type=Path, help=f"folder for {FILE} and {PICTURE}; default: neither is written")
    add("--json", action="store_true", help="print the numbers as JSON instead of the table")
    add("--micro_batch", type=int, default=256, help="images per rank and forward; default 256")
    text = "seconds to wait for a silent rank; default 600"
    add("--timeout", type=float, default=600.0, help=text)
    return parser
