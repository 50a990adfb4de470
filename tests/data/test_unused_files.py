"""Files of an image tree that are not used, each told: passed over, unreadable, or refused."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture, write_tree
from PIL import Image

from dist_looksam.data import EvalLoader, TrainLoader, load
from dist_looksam.data.folder import SUFFIXES
from dist_looksam.data.source import UNREADABLE
from dist_looksam.errors import ConfigError, RunError
from dist_looksam.run.train import main

CORRUPT = b"no image at all"
FLAGS = ["--data", "folder", "--image_size", "28", "--model", "vit_28_mini", "--batch_size", "4",
         "--steps", "3", "--device", "cpu", "--optimizer", "sgd"]  # fmt: skip


def fetch(source, indices):
    indices = torch.as_tensor(indices)
    return source.fetch(indices, indices, False)


def train(tree: Path, out: Path, *flags: str) -> tuple[str, dict]:
    """What log.txt and summary.json say of a short run."""
    assert main([*FLAGS, "--data_dir", str(tree), "--out", str(out), *flags]) == 0
    return (out / "log.txt").read_text(), json.loads((out / "summary.json").read_text())


# Kinds of files.


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_image_is_read_also_in_upper_case(tmp_path, suffix):
    """.tif, .ppm, .pgm, .gif, .jfif and .avif were passed over without a word."""
    tree = write_tree(tmp_path, train=1, val=1)
    kind = Image.registered_extensions()[suffix]
    picture(9).save(tree / "train" / "cat" / f"1{suffix.upper()}", format=kind)
    source = load("folder", tree, image_size=8).train
    images, labels = fetch(source, [0, 1, 2])
    assert labels.tolist() == [0, 0, 1] and not source.unreadable
    if suffix not in (".pgm", ".pbm", ".gif"):
        middle = picture(9).resize(
            (8, 8), Image.Resampling.BILINEAR, box=(13.75, 3.75, 66.25, 56.25)
        )
        expected = torch.from_numpy(np.array(middle)).permute(2, 0, 1)
        assert (images[1].float() - expected.float()).abs().mean() < 6


@pytest.mark.parametrize(
    "levels", [np.full((8, 8), 0.5, np.float32), np.full((8, 8), 2**20, np.int32)]
)
def test_pictures_of_a_depth_that_would_become_black_or_wrap_are_unreadable(tmp_path, levels):
    """A TIFF of floats in 0..1 would be a black picture, one of 32 bits the rest of its levels."""
    tree = write_tree(tmp_path, train=1, val=1)
    Image.fromarray(levels).save(tree / "train" / "cat" / "1.tif")
    source = load("folder", tree, image_size=8).train
    with pytest.warns(UserWarning, match=r"1\.tif"):
        assert fetch(source, [1])[1].tolist() == [UNREADABLE]


def test_whatever_is_passed_over_is_counted_with_its_reason(tmp_path):
    tree = write_tree(tmp_path / "tree")
    cat = tree / "train" / "cat"
    for name in ("a.svg", "b.txt"):
        (cat / name).write_text("x")
    (cat / "._0.jpg").write_text("x")
    (cat / "dangling.jpg").symlink_to("nowhere.jpg")
    (cat / "linked.jpg").symlink_to("0.jpg")
    (cat / "more").mkdir()
    (cat / "odd.png").mkdir()
    (tree / "train" / "list.csv").write_text("x")
    (tree / "val" / "lost+found").mkdir()
    data = load("folder", tree, image_size=8)
    assert len(data.train) == 13
    assert {why: count for why, (count, _) in data.train.passed_over.items()} == {
        "no images by their names": 2,
        "hidden": 1,
        "links to nothing": 1,
        "folders inside a class": 2,
        "files beside the class folders": 1,
    }
    assert {why: count for why, (count, _) in data.test.passed_over.items()} == {
        "made by the file system": 1
    }


def test_log_and_summary_say_what_was_passed_over(tmp_path):
    tree = write_tree(tmp_path / "tree")
    for split in ("train", "val"):
        (tree / split / "cat" / "a.svg").write_text("x")
    (tree / "train" / "dog" / ".hidden.jpg").write_text("x")
    log, summary = train(tree, tmp_path / "run")
    assert "2 passed over in the data, no images by their names, such as " in log
    assert f"{tree}/train/cat/a.svg" in log
    assert "1 passed over in the data, hidden" in log
    assert summary["passed_over"] == {"no images by their names": 2, "hidden": 1}
    log, summary = train(tree, tmp_path / "held", "--holdout", "4")
    assert summary["passed_over"] == {"no images by their names": 1, "hidden": 1}
    assert "unreadable" not in summary


# Trees that cannot be read.


def class_link_to_nothing(tree: Path) -> None:
    """It took the class out, and the others' numbers changed."""
    (tree / "train" / "emu").symlink_to(tree / "nowhere")


def class_loop(tree: Path) -> None:
    (tree / "train" / "emu").symlink_to("emu")


def only_files(tree: Path) -> None:
    shutil.rmtree(tree / "train")
    (tree / "train" / "lost+found").mkdir(parents=True)
    (tree / "train" / "0.jpg").write_text("x")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (class_link_to_nothing, "emu must be a folder, got a link to nothing"),
        (class_loop, "emu must be a folder, got a link to nothing"),
        (only_files, "train has no class folders; put"),
    ],
)
def test_a_tree_whose_classes_are_in_doubt_is_refused(tree: Path, damage, says):
    damage(tree)
    with pytest.raises(ConfigError, match=says):
        load("folder", tree)


@pytest.mark.needs("root")
@pytest.mark.parametrize("closed", ["train/lost+found", "train/cat", "train", "val/dog", "."])
def test_a_folder_that_may_not_be_read_is_one_sentence(closed):
    """`lost+found` belongs to root alone: a disk of its own for the images ended in a traceback."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's folders are root's alone
        os.chmod(folder, 0o755)
        tree = write_tree(Path(folder) / "tree", train=2, val=1)
        (tree / "train" / "lost+found").mkdir()
        (tree / closed).chmod(0o700)
        os.seteuid(65534)
        try:
            if "lost+found" in closed:
                assert load("folder", tree).train.class_names == ("cat", "dog")
                return
            with pytest.raises(ConfigError, match=r"can be read, got .*Permission denied"):
                load("folder", tree)
        finally:
            os.seteuid(0)


# Files that turn out to be damaged.


def test_an_unreadable_file_is_named_once_and_has_no_label(tree: Path):
    cat = tree / "train" / "cat"
    whole = (cat / "2.jpg").read_bytes()
    (cat / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (cat / "3.jpg").write_bytes(CORRUPT)
    (tree / "train" / "dog" / "5.jpg").write_bytes(b"")
    source = load("folder", tree, image_size=32).train
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            labels = fetch(source, [2, 3, 4, 11, 0])[1]
    assert labels.tolist() == [UNREADABLE, UNREADABLE, 0, UNREADABLE, 0]
    assert len(warned) == 3 == len(source.unreadable)
    for name, path in zip(("cat/2.jpg", "cat/3.jpg", "dog/5.jpg"), source.unreadable):
        assert path.endswith(name)


def test_a_truncated_png_is_unreadable_and_not_half_grey(tmp_path: Path):
    source = load("folder", write_tree(tmp_path / "t", suffix=".png"), image_size=32).train
    path = Path(source.path(0))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.warns(UserWarning, match=r"0\.png"):
        assert fetch(source, [0, 1])[1].tolist() == [UNREADABLE, 0]


@pytest.mark.filterwarnings("ignore:cannot read")
@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_the_next_sample_takes_the_place_of_an_unreadable_one(tree: Path, workers):
    def batches() -> list:
        source = load("folder", tree, image_size=8, augment="none").train
        loader = TrainLoader(
            source, seed=0, batch_size=12, micro_batch=12, rank=0, ranks=1, workers=workers
        )
        order = loader._order.permutation(0)
        (batch,) = loader.step(0)
        loader.close()
        return order, batch

    order, whole = batches()
    for name in ("cat/5.jpg", "dog/0.jpg", "dog/5.jpg"):
        (tree / "train" / name).write_bytes(CORRUPT)
    _, damaged = batches()
    instead = {5: 7, 6: 7, 11: 0}
    where = {int(index): i for i, index in enumerate(order)}
    for i, index in enumerate(order.tolist()):
        j = where[instead.get(index, index)]
        assert damaged.images[i].equal(whole.images[j])
        assert damaged.labels[i] == whole.labels[j]


@pytest.mark.filterwarnings("ignore:cannot read")
def test_an_image_that_is_held_out_is_never_trained_on_in_place_of_another(tree: Path):
    """The next file of the whole tree took the place of an unreadable one: with --holdout it could
    be one that the run is tested on."""
    data = load("folder", tree, image_size=8, augment="none", holdout=6)
    held = {bytes(im.numpy().tobytes()) for im in fetch(data.test, range(6))[0]}
    for index in data.train.indices[:5].tolist():
        Path(data.train.source.path(index)).write_bytes(CORRUPT)
    loader = TrainLoader(
        data.train, seed=0, batch_size=6, micro_batch=6, rank=0, ranks=1, workers=0
    )
    (batch,) = loader.step(0)
    shown = {bytes(im.numpy().tobytes()) for im in batch.images}
    assert len(shown) == 1 and not shown & held


@pytest.mark.filterwarnings("ignore:cannot read")
def test_an_unreadable_test_image_does_not_count_its_neighbour_twice(tree: Path):
    """The neighbour took its place, and counted twice."""
    (tree / "val" / "cat" / "1.jpg").write_bytes(CORRUPT)
    test = load("folder", tree, image_size=8).test
    loader = EvalLoader(test, micro_batch=4, rank=0, ranks=1, workers=2)
    labels = torch.cat([batch.labels for batch in loader])
    loader.close()
    assert labels.tolist() == [0, UNREADABLE, 0, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:cannot read")
@pytest.mark.parametrize("what", ["train", "val"])
def test_a_lost_disk_is_an_error_and_not_an_endless_search(tmp_path: Path, what):
    tree = write_tree(tmp_path, train=60, val=60)
    data = load("folder", tree, image_size=8, augment="none")
    shutil.rmtree(tree / what)
    with pytest.raises(RunError, match="100 image files in a row cannot be read, one of them is "):
        if what == "train":
            options = {"seed": 0, "batch_size": 4, "micro_batch": 4, "rank": 0, "ranks": 1}
            TrainLoader(data.train, workers=0, **options).step(0)
        else:
            list(EvalLoader(data.test, micro_batch=8, rank=0, ranks=1, workers=0))


@pytest.mark.filterwarnings("ignore")
def test_log_and_summary_count_unreadable_files_with_python_warnings_off(tmp_path):
    """40 of 80 broken files left no trace but Python's warnings."""
    tree = write_tree(tmp_path / "tree", train=40, val=3)
    for name in ("cat", "dog"):
        for i in range(20):
            (tree / "train" / name / f"{i}.jpg").write_bytes(CORRUPT)
    (tree / "val" / "cat" / "1.jpg").write_bytes(CORRUPT)
    log, summary = train(tree, tmp_path / "run", "--steps", "20", "--eval_every", "10")
    assert summary["unreadable"] == 41
    assert re.search(r"warning: cannot read \S+/(cat|dog)/\d+\.jpg \(no image\)", log)
    assert " 41 unreadable so far: in training the next image takes the place" in log
    assert summary["top1"] * 5 == pytest.approx(round(summary["top1"] * 5))


@pytest.mark.filterwarnings("ignore")
def test_a_test_set_of_unreadable_files_is_one_sentence(tmp_path, capfd):
    tree = write_tree(tmp_path / "tree")
    for file in (tree / "val").rglob("*.jpg"):
        file.write_bytes(CORRUPT)
    out = tmp_path / "run"
    assert main([*FLAGS, "--data_dir", str(tree), "--out", str(out)]) == 1
    assert "error: no test image can be read" in capfd.readouterr().err
    assert "6 unreadable so far" in (out / "log.txt").read_text()
