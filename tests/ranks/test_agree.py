"""Ranks that were given different data or settings: refused before training, each named."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from forks import place
from PIL import Image

from dist_looksam.data import load
from dist_looksam.data.fingerprint import fingerprint
from dist_looksam.run import agree
from dist_looksam.run.train import main
from dist_looksam.settings import config
from launch import HERE, environment

FLAGS = ["--data", "folder", "--image_size", "28", "--model", "vit_28_mini", "--batch_size", "4",
         "--device", "cpu", "--optimizer", "sgd", "--augment", "none"]  # fmt: skip


def write_tree(root: Path) -> Path:
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", (20, 20), (40 * i, 100 * label, 50))
                picture.save(root / split / name / f"{i}.jpg")
    return root


def unfinished(tree: Path) -> None:
    (tree / "train" / "dog" / "5.jpg").unlink()


def renamed(tree: Path) -> None:
    (tree / "train" / "dog" / "5.jpg").rename(tree / "train" / "dog" / "x.jpg")


def cut_off(tree: Path) -> None:
    file = tree / "train" / "dog" / "5.jpg"
    file.write_bytes(file.read_bytes()[:-20])


def in_another_class(tree: Path) -> None:
    """As many files of as many names."""
    for name, other in (("cat", "dog"), ("dog", "cat")):
        (tree / "train" / name / "5.jpg").rename(tree / "train" / other / f"6{name}.jpg")


def another_class(tree: Path) -> None:
    for split in ("train", "val"):
        (tree / split / "dog").rename(tree / split / "emu")


def fewer_tests(tree: Path) -> None:
    (tree / "val" / "dog" / "1.jpg").unlink()


CHANGES = {
    unfinished: "number of training images",
    renamed: "names and sizes of the training images (their hash)",
    cut_off: "names and sizes of the training images (their hash)",
    in_another_class: "names and sizes of the training images (their hash)",
    another_class: "names of the classes (their hash)",
    fewer_tests: "number of test images",
}


def opened(tree: Path) -> dict:
    return fingerprint(load("folder", tree, image_size=28))


def differing(one: dict, other: dict) -> list[str]:
    return [name for name in one if one[name] != other[name]]


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_is_of_the_data_and_not_of_their_place(tmp_path, change):
    first, second = (write_tree(tmp_path / name) for name in "ab")
    before = opened(first)
    assert before == opened(second)
    change(second)
    assert differing(before, opened(second))[0] == CHANGES[change]


def test_a_part_of_the_data_has_a_fingerprint_of_its_own():
    prints = [fingerprint(load("digits", holdout=n)) for n in (0, 300, 301)]
    assert differing(prints[0], prints[1]) and differing(prints[1], prints[2])
    assert prints[1] == fingerprint(load("digits", holdout=300, seed=1))


def start(flags: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and stderr of train.py on each rank, with flags of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE.parents[1] / "train.py"), *FLAGS, "--timeout", "60", *mine],
            env=environment(
                MASTER_PORT=port, **{k: str(v) for k, v in place(rank, len(flags)).items()}
            ),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank, mine in enumerate(flags)
    ]
    try:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
        return [(rank.returncode, err) for rank, err in zip(ranks, said, strict=True)]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("length", ["--steps", "--epochs"])
def test_ranks_that_see_different_trees_do_not_train(tmp_path, length):
    """With --steps the run ended well, though each rank shuffled other data; with --epochs the
    ranks had other numbers of steps, and gloo aborted."""
    trees = [write_tree(tmp_path / name) for name in "ab"]
    unfinished(trees[1])
    out = tmp_path / "run"
    flags = [["--data_dir", str(tree), length, "3", "--out", str(out)] for tree in trees]
    (code, said), (other_code, _) = start(flags)
    assert (code, other_code) == (2, 2), said
    host = socket.gethostname()
    assert (
        f"error: number of training images must be the same on all ranks, got 12 on rank 0 on "
        f"{host} and 11 on rank 1 on {host}; " in said
    )
    assert not (out / "metrics.jsonl").exists()


def test_ranks_with_other_settings_do_not_train(tmp_path):
    tree = write_tree(tmp_path / "a")
    common = ["--data_dir", str(tree), "--steps", "3", "--out", str(tmp_path / "run")]
    (code, said), (other_code, _) = start([[*common, "--seed", "1"], [*common, "--seed", "2"]])
    assert (code, other_code) == (2, 2), said
    assert "seed must be the same on all ranks, got 1 on rank 0" in said


@pytest.mark.needs("deepspeed")
def test_ranks_with_other_deepspeed_files_do_not_train(tmp_path):
    tree = write_tree(tmp_path / "a")
    flags = []
    for n in (1000, 2000):
        file = tmp_path / f"{n}.json"
        file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": n}}))
        flags.append(["--data_dir", str(tree), "--steps", "3", "--out", str(tmp_path / "run"),
                      "--backend", "zero", "--deepspeed_config", str(file)])  # fmt: skip
    (code, said), _ = start(flags)
    assert code == 2 and "deepspeed_config must be the same on all ranks" in said


def test_files_of_class_weights_are_compared_by_what_they_say(tmp_path):
    """Their paths alone were compared: ranks with other weights would have trained together."""

    def inputs(text):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        file.write_text(text)
        return agree._inputs(config.parse(["--data", "digits", "--class_weights", str(file)]), data)

    data = load("digits")
    one, same, other = inputs("a: 1\nb: 2"), inputs("{b: 2, a: 1}"), inputs("a: 1\nb: 3")
    assert repr(one) == repr(same) and differing(one, other) == ["class_weights"]


def test_the_same_data_in_another_place_train(tmp_path):
    trees = [write_tree(tmp_path / name) for name in "ab"]
    out = tmp_path / "run"
    flags = [["--data_dir", str(tree), "--steps", "3", "--out", str(out)] for tree in trees]
    assert [code for code, _ in start(flags)] == [0, 0]


def test_a_resume_on_changed_data_is_told(tmp_path):
    tree, out = write_tree(tmp_path / "a"), tmp_path / "run"
    flags = [*FLAGS, "--data_dir", str(tree), "--out", str(out), "--resume", "auto"]
    assert main([*flags, "--steps", "4", "--save_every", "2"]) == 0
    assert main([*flags, "--steps", "6"]) == 0
    assert "the data have changed" not in (out / "log.txt").read_text()
    shutil.copy(tree / "train" / "cat" / "0.jpg", tree / "train" / "cat" / "new.jpg")
    assert main([*flags, "--steps", "8"]) == 0
    log = (out / "log.txt").read_text()
    assert "the data have changed: number of training images is 13, was 12 when" in log
