"""A folder, its tar shards and its Parquet files give the same weights, on any ranks, resumed; with
all augmentations and growing images, and sharded."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dist_looksam.cli.main import main
from launch import HERE, run

sys.path.append(str(HERE.parent / "data"))
import parquets

STEPS, KILLED = 5, 4  # an epoch is 6 steps
FLAGS = ["--image_size", "28", "--model", "vit_28_mini", "--batch_size", "12", "--steps",
         str(STEPS), "--optimizer", "look_sam", "--base", "sgd", "--k", "2", "--augment",
         "crop,flip,3augment,jitter,erasing,mixup,cutmix,repeat:3", "--mixup_until", "0.8",
         "--image_size_from", "14", "--workers", "2", "--save_every", "1", "--eval_every", "100",
         "--micro_batch", "2", "--device", "cpu", "--resume", "auto"]  # fmt: skip
BLOCKS = ["--shuffle", "block:8,4,3"]
KINDS = ["folder", "tar", *(["parquet"] if importlib.util.find_spec("pyarrow") else [])]
RESUMED = [("folder", 2), *((kind, ranks) for kind in KINDS[1:] for ranks in (1, 3))]
ON_DEVICE = [("folder", 2), ("tar", 1), ("tar", 3)]  # of the full order; the others on the host
MIXED = [(kind, ranks) for kind, ranks in zip(KINDS[1:], (3, 2))]
ON = {  # others are on DDP
    ("tar", 3, "full"): ["--backend", "zero", "--zero_stage", "3"],
    ("parquet", 3, "full"): ["--backend", "zero", "--zero_stage", "2"],
    ("tar", 3, "block"): ["--backend", "fsdp2"],
}

pytestmark = pytest.mark.needs("deepspeed")


def write_tree(root: Path) -> Path:
    """72 training pictures and 6 others of three classes, colours with noise."""
    numbers = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 2)):
        for label in range(3):
            folder = root / split / "abc"[label]
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = numbers.integers(0, 156, (40, 32, 3)).astype(np.uint8)
                pixels[:, :, label] += 100
                Image.fromarray(pixels).save(folder / f"{n:02d}.jpg")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(kind, ranks, order) -> run directory. All are killed in step 4 but (folder, 1, full) and
    (tar, 1, block)."""
    folder = tmp_path_factory.mktemp("kinds")
    tree = write_tree(folder / "tree")
    main(["data", "pack", str(tree), str(folder / "tar"), "--shard_mb", "1"])
    main(["data", "pack", str(tree), str(folder / "mixed-tar"), "--shuffle", "1"])
    places = {"folder": tree, "tar": folder / "tar"}
    if "parquet" in KINDS:
        places["parquet"] = parquets.of_folder(tree, folder / "hub", group=10)
        mix(folder / "mixed-tar", folder / "mixed-parquet")
        for name in ("hub", "mixed-parquet"):
            main(["data", "index", str(folder / name)])
    jobs = []
    for kind, ranks, order in [("folder", 1, "full"), ("tar", 1, "block")]:
        jobs.append([ranks, flags(folder, places, kind, ranks, order), None])
    for order, cases in (("full", RESUMED), ("block", MIXED)):
        for kind, ranks in cases:
            line = flags(folder, places, kind, ranks, order)
            line += ["--data_cache", "/proc/none"] * ((kind, ranks) == ("tar", 3))
            jobs += [[ranks, line, KILLED], [ranks, line, None]]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run([sys.executable, str(HERE / "data_kinds_worker.py"), str(folder / "jobs.json")], 600, {})
    return lambda kind, ranks, order: folder / f"{kind}-{ranks}-{order}"


def flags(folder: Path, places: dict, kind: str, ranks: int, order: str) -> list[str]:
    place, more = (places[kind], []) if order == "full" else (folder / f"mixed-{kind}", BLOCKS)
    if order == "full" and (kind, ranks) in ON_DEVICE:
        more = ["--augment_on", "device"]
    out = folder / f"{kind}-{ranks}-{order}"
    more = [*more, *ON.get((kind, ranks, order), [])]
    return ["--data", kind, "--data_dir", str(place), "--out", str(out), *FLAGS, *more]


def mix(shards: Path, target: Path) -> None:
    """Mixed shards as Parquet files."""
    from dist_looksam.data import load

    data = load("tar", shards)
    for name, split in (("train", data.train), ("val", data.test)):
        rows = [split.encoded(n) for n in range(len(split))]
        names = data.train.class_names
        labels = split.labels.tolist()
        parquets.write(target / f"{name}.parquet", rows, labels, names=names, group=10)


def worst(one: Path, other: Path) -> float:
    a, b = (load_file(path / "model.safetensors") for path in (one, other))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(
    ("kind", "ranks", "order"),
    [(*case, "full") for case in RESUMED] + [(*case, "block") for case in MIXED],
)
def test_a_killed_and_resumed_run_ends_in_the_weights_of_an_undisturbed_one(
    trained, kind, ranks, order
):
    """The truth augments on the host, some of the others on the device."""
    truth = trained("folder", 1, "full") if order == "full" else trained("tar", 1, "block")
    got = trained(kind, ranks, order)
    log = (got / "log.txt").read_text()
    assert "resumed from" in log and f"{STEPS}/{STEPS}" in log
    there = order == "full" and (kind, ranks) in ON_DEVICE
    assert log.count("policy and jitter are made on the device, with") == 2 * there
    assert worst(got, truth) == 0 if ranks == 1 else worst(got, truth) < 1e-6
    assert "unreadable" not in json.loads((got / "summary.json").read_text())


def test_ranks_that_cannot_fill_their_cache_say_so_once_and_train_the_same(trained):
    """On each of 3 ranks, of both starts; the weights are compared above."""
    lines = (trained("tar", 3, "full") / "log.txt").read_text().splitlines()
    said = [line for line in lines if "not from a cache: the cache /proc/none" in line]
    assert len(said) == 2 and all("cannot be filled" in line for line in said)


def test_weights_that_saw_other_samples_are_further_apart(trained):
    full, block = trained("folder", 1, "full"), trained("tar", 1, "block")
    assert worst(full, block) > 1e-4
    assert torch.isfinite(torch.tensor(worst(full, block)))
