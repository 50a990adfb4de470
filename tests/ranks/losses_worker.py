"""Ranks that train with every loss on every backend, the real loss of train.py around a small net,
or around a ViT with everything that a published variant has.

python losses_worker.py FOLDER     the cases by number of ranks: FOLDER/cases.json
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import ddp_worker
import forks
import fsdp_worker
import task
import torch
import torch.distributed as dist
import zero_worker

from dist_looksam import Engine
from dist_looksam.data import Batch
from dist_looksam.data.mixing import swap
from dist_looksam.models.vit import Size, ViT
from dist_looksam.settings import assemble, config

COUNTS = {"a": 5, "b": 3, "c": 2}  # of training samples
LABELS = torch.repeat_interleave(torch.arange(3), torch.tensor(list(COUNTS.values())))
DATA = SimpleNamespace(train=SimpleNamespace(labels=LABELS, class_names=tuple(COUNTS)))


NET = task.net
VARIANT = Size(
    patch=2, dim=8, depth=2, heads=2, class_token=True, registers=2, layer_scale=0.5, qk_norm=True
)


def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(VARIANT, num_classes=3, image_shape=(1, 4, 4))


def images(step: int) -> torch.Tensor:
    """Of a step's global batch, for `vit`."""
    draw = torch.Generator().manual_seed(2000 + step)
    return torch.randn(task.BATCH, 1, 4, 4, generator=draw)


def shares(step: int) -> torch.Tensor:
    """Of a sample's own label, the same in both samples of a pair; 1 in the last pair."""
    draw = torch.Generator().manual_seed(step)
    lam = torch.rand(task.BATCH // 2, generator=draw)
    lam[-1] = 1.0
    return lam.repeat_interleave(2)


def batches(case: dict, step: int, rank: int, ranks: int) -> list[Batch]:
    """This rank's two micro-batches."""
    x, y = task.batch(step)
    x = images(step) if case.get("net") == "vit" else x
    whole = {"images": x, "labels": y, "keys": torch.arange(task.BATCH), "partner": swap(y)}
    whole["lam"], n = shares(step), task.BATCH // (2 * ranks)
    starts = [(a * ranks + rank) * n for a in range(2)]
    cut = [{name: value[s : s + n] for name, value in whole.items()} for s in starts]
    return [Batch(**part, mean=(), std=()) for part in cut]


def engine_of(case: dict) -> Engine:
    task.net = vit if case.get("net") == "vit" else NET
    case = {**case, "units": "net" not in case}  # of FSDP2, by names of the small net's layers
    if case["on"] == "zero":
        made = zero_worker.open_engine({**case, "stage": 2})
    else:
        made = {"fsdp2": fsdp_worker}.get(case["on"], ddp_worker).engine_of(case)
    settings = config.parse([*case["flags"], "--data", "digits"])
    loss = assemble.loss_of(settings, DATA, torch.device("cpu"))  # type: ignore[arg-type]
    return Engine(made.backend, loss=loss)


def played(case: dict) -> dict:
    engine, rank, ranks = engine_of(case), dist.get_rank(), dist.get_world_size()
    losses = [
        float(engine.step(batches(case, step, rank, ranks)).loss) for step in range(task.STEPS)
    ]
    return {"weights": engine.backend.full_weights(), "losses": losses}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    forks.load_deepspeed()

    def kept(case: dict) -> None:
        result = played(case)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{case['name']}.pt")

    for ranks, cases in json.loads((folder / "cases.json").read_text()).items():
        forks.play(folder, int(ranks), kept, cases)


if __name__ == "__main__":
    main()
