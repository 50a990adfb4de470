"""Tar shards: packed, indexed and read as their folder; what is wrong with them is a sentence."""

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import jpeg, samples, write_shard
from safetensors.torch import load_file

from dist_looksam.cli.main import main
from dist_looksam.data import index, load, shards
from dist_looksam.data.fingerprint import fingerprint
from dist_looksam.data.tar import Tar
from dist_looksam.errors import ConfigError


def indexed(where: Path) -> Path:
    assert main(["data", "index", str(where)]) == 0
    return where


def test_a_packed_folder_gives_the_folders_pictures_labels_and_classes(tree, packed):
    how = {"image_size": 32, "augment": "crop,flip", "seed": 3}
    before, after = load("folder", tree, **how), load("tar", packed, **how)
    assert after.train.class_names == before.train.class_names == ("cat", "dog")
    for a, b, count in ((before.train, after.train, 12), (before.test, after.test, 6)):
        i = torch.arange(count).flip(0)
        for x, y in zip(a.fetch(i, i + 9, True), b.fetch(i, i + 9, True), strict=True):
            assert torch.equal(x, y)


@pytest.mark.slow
def test_a_run_on_a_folder_and_on_its_tars_ends_in_the_same_weights(tree, packed, tmp_path):
    for name, place in (("folder", tree), ("tar", packed)):
        flags = ["--data", name, "--data_dir", str(place), "--image_size", "32", "--steps", "4"]
        flags += ["--model", "vit_ti16", "--batch_size", "4", "--out", str(tmp_path / name)]
        assert main(["train", *flags]) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("folder", "tar"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_shards_of_other_programs_are_read(two):
    data = load("tar", indexed(two), image_size=32)
    assert data.train.class_names == ("0", "1")
    assert data.train.labels.tolist() == [1, 0, 1, 0, 0] and data.test.labels.tolist() == [1, 0]
    images, _ = data.train.fetch(torch.tensor([4, 0]), torch.tensor([4, 0]), False)
    own = load("tar", str(two / "{train-{000000..000001},val-000000}.tar").replace(
        "{train-{000000..000001},val-000000}", "{train-000000,train-000001,val-000000}"
    ), image_size=32)  # fmt: skip
    again, _ = own.train.fetch(torch.tensor([4, 0]), torch.tensor([4, 0]), False)
    assert torch.equal(images, again)


@pytest.mark.parametrize(
    ("names", "labels", "numbers"),
    [
        (["0", "2", "5"], [0, 2, 5], [0, 1, 2]),  # some classes of a larger set
        (["1", "2", "3"], [1, 2, 3], [0, 1, 2]),
        (["1", "10", "2"], [0, 1, 2], [0, 1, 2]),  # packed from folders of these names
        (["cat", "dog", "elk"], [2, 0, 1], [2, 0, 1]),
    ],
)
def test_numbers_are_all_places_in_the_list_of_classes_or_all_names(
    names, labels, numbers, tmp_path
):
    """Each label by itself, 2 was a place and 5 a name: two classes became one."""
    write_shard(tmp_path / "train-0.tar", samples(*labels))
    write_shard(tmp_path / "val-0.tar", samples(*labels[:2]))
    (tmp_path / "classes.txt").write_text("\n".join(names))
    data = load("tar", indexed(tmp_path))
    assert data.train.class_names == tuple(names)
    assert data.train.labels.tolist() == numbers and data.test.labels.tolist() == numbers[:2]


@pytest.mark.parametrize("how", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_capitals_folders_and_parts_that_lie_apart_are_right(tmp_path, how):
    """Long names are stored in members of their own, which a naive scan takes for samples. The key
    ends at the first dot of the base name; parts of a sample need not be neighbours."""
    long = "x" * 150
    members = {
        "._0.jpg": b"of macOS",
        f"train.v1/{long}.JPEG": jpeg(0),
        "train.v1/b.seg.png": jpeg(1),
        "README": b"no sample",
        "__info__.json": b"{}",
        f"train.v1/{long}.CLS": b"dog\n",
        "train.v1/b.json": json.dumps({"cls": "cat"}).encode(),
    }
    write_shard(tmp_path / "train-0.tar", members, how)
    write_shard(tmp_path / "val-0.tar", samples("cat", "dog"), how)
    data = load("tar", indexed(tmp_path), image_size=32)
    assert data.train.class_names == ("cat", "dog") and data.train.labels.tolist() == [1, 0]
    assert {why: count for why, (count, _) in data.train.passed_over.items()} == {
        "hidden": 1, "names without a dot": 1, "no picture": 1,
    }  # fmt: skip
    assert data.train.encoded(0) == members[f"train.v1/{long}.JPEG"]


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    for n in (10, 2, 1):
        write_shard(tmp_path / f"train-{n}.tar", samples(n % 2, first=n))
    write_shard(tmp_path / "val.tar", samples(0, 1))
    train = load("tar", indexed(tmp_path)).train
    assert [path.name for path in train.index.shards] == [f"train-{n}.tar" for n in (1, 2, 10)]
    assert train.labels.tolist() == [1, 0, 0]


def test_a_brace_pattern_is_padded_to_its_first_number():
    names = shards.expand("d/{train,val}-{098..101}.tar")
    assert names[:4] == [f"d/train-{n}.tar" for n in ("098", "099", "100", "101")]
    assert len(names) == 8 and names[-1] == "d/val-101.tar"
    assert shards.expand("a{0..2}") == ["a0", "a1", "a2"]


def compress(where):
    data = (where / "train-000001.tar").read_bytes()
    (where / "train-000001.tar").write_bytes(gzip.compress(data))


def cut_in_a_member(where):
    os.truncate(where / "train-000001.tar", 1200)


def cut_behind_a_member(where):
    with tarfile.open(where / "train-000001.tar") as tar:
        last = tar.getmembers()[-1]
    os.truncate(where / "train-000001.tar", last.offset_data + 512)


def join(where):
    both = [(where / f"train-00000{n}.tar").read_bytes() for n in (0, 1)]
    (where / "train-000001.tar").write_bytes(b"".join(both))


def link(where):
    with tarfile.open(where / "train-000001.tar", "a") as tar:
        member = tarfile.TarInfo("9.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


def with_members(**parts):
    members = {name.replace("__", "."): value for name, value in parts.items()}
    return lambda where: write_shard(where / "train-000001.tar", {**samples(0), **members})


def append(name, data):
    def change(where):
        with tarfile.open(where / "train-000001.tar", "a") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

    return change


def relabel(*labels):
    return lambda where: write_shard(where / "train-000000.tar", samples(*labels))


WRONG = {
    "compressed": (compress, r"train-000001.tar is compressed \(gzip\)"),
    "cut in a member": (cut_in_a_member, "train-000001.tar (is cut off|cannot be read|has no end)"),
    "cut behind a member": (cut_behind_a_member, "train-000001.tar has no end mark"),
    "joined": (join, "train-000001.tar goes on behind its end"),
    "a link": (link, "holds 9.jpg, a link"),
    "no label": (with_members(a__jpg=b"x"), "has no label of a"),
    "label -1": (with_members(a__jpg=b"x", a__cls=b"-1"), "gives a the label -1"),
    "an empty label": (with_members(a__jpg=b"x", a__cls=b"\n"), "has no label of a"),
    "a label of another kind": (with_members(a__jpg=b"x", a__json=b"[1]"), "has no label of a"),
    "two pictures": (with_members(a__jpg=b"x", a__png=b"x", a__cls=b"0"), "two pictures of a"),
    "a member twice": (append("0003.jpg", b"x"), "holds 0003.jpg twice"),
    "a gap in the labels": (relabel(0, 1, 3), "without a gap, got none of 2 but 3"),
    "names and numbers": (relabel(0, "cat", 1), "all numbers or all names"),
    "one class": (relabel(0, 0, 0), "two classes or more, got 1"),
    "no test shards": (lambda w: (w / "val-000000.tar").unlink(), "none of val"),
    "an unknown test class": (
        lambda w: write_shard(w / "val-000000.tar", samples(7)), "class 7 is in the shards of val"),
    "another name": (
        lambda w: (w / "val-000000.tar").rename(w / "part-0.tar"), "must begin with train, val"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_shard_is_one_sentence(name, two, capsys):
    change, says = WRONG[name]
    change(two)
    assert main(["data", "index", str(two)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    with pytest.raises(ConfigError, match=says):
        shards.write_index(two)
    assert not list(two.glob(".index-*"))


def touch(where):
    os.utime(where / "train-000001.tar", (1, 1))


def lengthen(where):
    stat = (where / "train-000001.tar").stat()
    with (where / "train-000001.tar").open("ab") as file:
        file.write(b"\0")
    os.utime(where / "train-000001.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def relabel(where):
    """As where a write was cut off between the rows and the JSON that names their hash."""
    rows = np.load(where / ".index-train.npy")
    rows["label"] = rows["label"][::-1].copy()
    np.save(where / ".index-train.npy", rows)


CHANGED = {
    "none was made": (lambda w: (w / ".index-val.json").unlink(), "need an index, got none of val"),
    "the rows are missing": (lambda w: (w / ".index-val.npy").unlink(), "got none of val"),
    "a shard is newer": (touch, "train-000001.tar with another size or time"),
    "a shard is longer": (lengthen, "train-000001.tar with another size or time"),
    "a shard is new": (
        lambda w: write_shard(w / "train-000002.tar", samples(1)), "3 shards, got one of 2"),
    "rows of others": (
        lambda w: shutil.copy(w / ".index-val.npy", w / ".index-train.npy"), "which|describes"),
    "rows with other labels": (relabel, "must be what .*.index-train.json describes"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_an_index_that_is_not_of_these_shards_is_refused(name, two):
    """A stale index gives wrong pictures and labels without a word."""
    change, says = CHANGED[name]
    indexed(two)
    change(two)
    with pytest.raises(ConfigError, match=says) as error:
        load("tar", two)
    assert "dist-looksam data index" in str(error.value)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("s3://bucket/train-{0..3}.tar", "must be on a file system"),
        ("pipe:cat x.tar", "must be on a file system"),
        ("DIR/train-{000000..000003}.tar", "got no .*train-000002.tar and 1 others"),
        ("DIR/train-{000000..000001}.tar", "got none of val"),
        ("DIR/{train,{val}}.tar", "unmatched or nested braces"),
        ("DIR/empty", "got none in .*data pack SOURCE"),
    ],
)
def test_a_place_that_is_wrong_is_one_sentence(two, where, says):
    with pytest.raises(ConfigError, match=says):
        load("tar", where.replace("DIR", str(two)))


def test_compressed_shards_alone_are_named_as_such(tmp_path):
    (tmp_path / "train-0.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match="got compressed ones, which cannot be read at random"):
        load("tar", tmp_path)


def test_compressed_shards_beside_others_are_counted_as_passed_over(two):
    """They were left out without a word."""
    for name in ("train-000002.tar.gz", "train-000003.tgz", "train-000000.tar.md5"):
        (two / name).write_bytes(b"")
    train = load("tar", indexed(two)).train
    assert train.passed_over == {"compressed tar files": (2, f"{two}/train-000002.tar.gz")}


def test_test_shards_beside_those_of_val_are_passed_over(two):
    """They were evaluated together, so that settings were chosen on the test images, too."""
    write_shard(two / "test-000000.tar", samples(1, 1, 0))
    test = load("tar", indexed(two)).test
    assert len(test) == 2
    assert test.passed_over == {"shards beside those of val": (1, f"{two}/test-000000.tar")}
    for name in ("train-000000", "train-000001"):
        (two / f"{name}.tar").touch()
    (two / "val-000000.tar").unlink()
    assert len(load("tar", indexed(two)).test) == 3


def test_a_shard_that_became_shorter_is_an_unreadable_sample(two):
    data = load("tar", indexed(two), image_size=32)
    os.truncate(two / "train-000001.tar", 600)
    told = []
    data.train.on_corrupt = told.append
    _, labels = data.train.fetch(torch.tensor([0, 3]), torch.tensor([0, 3]), False)
    assert labels.tolist() == [1, -100] and "train-000001.tar at byte" in told[0]


# --- scale ---------------------------------------------------------------------------------------


@pytest.fixture
def imagenet(two):
    """Two shards whose index says that they hold ImageNet; its rows are made up."""
    rows = np.zeros(1_281_167, dtype=index.ROW)
    rows["label"] = np.arange(len(rows)) % 1000
    shards.write_index(two)
    about = two / ".index-train.json"
    content = json.loads(about.read_text())
    content["shards"][0]["samples"] = len(rows) - 2
    content["sha256"] = hashlib.sha256(rows.tobytes()).hexdigest()
    np.save(two / ".index-train.npy", rows)
    about.write_text(json.dumps(content))
    return two


def opened(where: Path) -> Tar:
    how = {"image_size": 32, "augment": None, "seed": 0}
    return Tar(index.read_index(where, "train", shards.shards_of(where)["train"]), **how)


def test_an_index_of_imagenets_size_opens_in_a_tenth_of_a_second(imagenet):
    assert (imagenet / ".index-train.npy").stat().st_size < 30_000_000
    took = []
    for _ in range(3):
        began = time.process_time()
        train = opened(imagenet)
        took.append(time.process_time() - began)
    assert isinstance(train.index.rows, np.memmap) and len(train) == 1_281_167
    assert min(took) < 0.1


def own_memory(path: Path) -> tuple[int, int]:
    """(bytes of a mapped file in this process's memory, those that no other process shares)."""
    about = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    sizes: Counter[str] = Counter()
    for mapped in about:
        if str(path) in mapped:
            for name, kb in re.findall(r"^(\w+): +(\d+) kB", mapped, re.M):
                sizes[name] += int(kb) * 1024
    return sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


def test_the_index_is_in_memory_once_for_all_processes_of_a_node(imagenet):
    """A second process, which opens it by itself and reads all rows, adds only its labels."""

    def second(pipe) -> None:
        train = opened(imagenet)
        assert int(train.index.rows["label"].max()) == 999
        pipe.send(own_memory(imagenet / ".index-train.npy"))

    first = opened(imagenet)
    assert int(first.index.rows["label"].max()) == 999
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=second, args=(there,))
    process.start()
    there.close()  # else a child that died would be waited for
    size, own = here.recv()
    process.join(30)
    assert size > 25_000_000 and own == 0


def test_more_shards_than_files_that_may_be_open_raise_the_limit(two):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 10, hard))
        load("tar", indexed(two))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > opened + 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_closed_source_gives_its_files_back(two):
    indexed(two)
    before = len(os.listdir("/proc/self/fd"))
    data = load("tar", two)
    assert isinstance(data.train, Tar) and len(os.listdir("/proc/self/fd")) >= before + 3
    del data
    assert len(os.listdir("/proc/self/fd")) == before


def test_shards_with_another_picture_or_label_are_other_data(two, tmp_path):
    """Ranks compare these fingerprints before they train: tests/ranks/test_agree.py."""
    prints = []
    for labels in ((1, 0, 1), (1, 1, 0)):
        write_shard(two / "train-000000.tar", samples(*labels))
        prints.append(fingerprint(load("tar", indexed(two))))
    assert [name for name in prints[0] if prints[0][name] != prints[1][name]] == [
        "names and sizes of the training images (their hash)"
    ]
