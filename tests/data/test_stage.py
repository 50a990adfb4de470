"""dist-looksam data stage and --data_cache: each byte copied once a node, and never half."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from pictures import samples, write_shard

from dist_looksam.cli.main import main
from dist_looksam.data import load
from dist_looksam.data.shards import shards_of
from dist_looksam.data.stage import stage
from dist_looksam.errors import ConfigError, RunError

HOST = socket.gethostname()
FORK = multiprocessing.get_context("fork")  # without the import of torch in every process


def written() -> int:
    """Bytes that the kernel has counted as written by this process."""
    return int(re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())[1])


def copy(source: Path, cache: Path, kill: bool, pipe: Connection) -> None:
    """Sends the bytes of all, those copied here, and those written. With `kill` the process ends
    once the first file is there, while a larger one is copied."""
    told = (lambda *_: os.kill(os.getpid(), signal.SIGKILL)) if kill else (lambda *_: None)
    before = written()
    done = stage(source, shards_of(source), cache, told)
    pipe.send((done.size, done.copied, written() - before))


def started(source: Path, cache: Path, kill: bool = False) -> tuple[Any, Connection]:
    here, there = FORK.Pipe()
    process = FORK.Process(target=copy, args=(source, cache, kill, there))
    process.start()
    there.close()  # else one that died would be waited for
    return process, here


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Five shards of 1 MB and one of 64 MB."""
    where = tmp_path / "large"
    where.mkdir()
    for n in range(6):
        name = f"train-{n}.tar" if n else "val-0.tar"
        extra = {f"{n}.bin": bytes(64_000_000 if n == 5 else 1_000_000)}
        write_shard(where / name, {**samples(0, 1, first=2 * n), **extra})
    assert main(["data", "index", str(where)]) == 0
    return where


def equal(one: Path, other: Path) -> bool:
    names = sorted(p.name for p in one.iterdir())
    copied = sorted(p.name for p in other.iterdir() if p.name != ".lock")
    return names == copied and all(
        (one / n).read_bytes() == (other / n).read_bytes() for n in names
    )


def test_four_ranks_at_once_copy_each_byte_once_and_a_killed_one_is_taken_over(large, tmp_path):
    cache = tmp_path / "cache"
    first, _ = started(large, cache, kill=True)
    first.join(60)
    assert first.exitcode == -signal.SIGKILL
    (folder,) = cache.iterdir()
    there = sum(path.stat().st_size for path in folder.glob("*.tar"))
    size = sum(path.stat().st_size for path in large.glob("*.tar"))
    assert 0 < there < size and not (folder / ".index-val.json").exists()
    ranks = [started(large, cache) for _ in range(4)]
    said = [pipe.recv() for _, pipe in ranks]
    for process, _ in ranks:
        process.join(60)
    assert sum(copied for _, copied, _ in said) == size - there
    assert size - there < sum(wrote for *_, wrote in said) < size - there + 100_000
    assert {total for total, *_ in said} == {size} and equal(large, folder)
    assert stage(large, shards_of(large), tmp_path / "cache").copied == 0


def test_the_copy_is_what_training_reads(two, tmp_path, capsys):
    assert main(["data", "index", str(two)]) == 0
    pattern = str(two / "{train-000000,train-000001,val-000000}.tar")
    for place in (str(two), pattern):
        capsys.readouterr()
        assert main(["data", "stage", place, str(tmp_path / "cache")]) == 0
    folder, _, said = capsys.readouterr().out.partition(": ")
    assert " 0 of them copied now; " in said
    data = load("tar", folder)
    assert data.train.labels.tolist() == [1, 0, 1, 0, 0]
    assert data.train.encoded(3) == load("tar", two).train.encoded(3)
    assert str(data.train.path(3)).startswith(folder)


def test_other_data_and_damaged_copies_are_copied_anew(two, tmp_path):
    main(["data", "index", str(two)])
    first = stage(two, shards_of(two), tmp_path / "cache")
    (first.folder / ".index-train.json").unlink()
    os.utime(first.folder / "train-000000.tar", (1, 1))
    again = stage(two, shards_of(two), tmp_path / "cache")
    assert again.copied == (two / "train-000000.tar").stat().st_size
    write_shard(two / "train-000000.tar", samples(0, 1, 1))
    for name in (".index-train.json", "train-000000.tar"):
        (first.folder / name).unlink()
    with pytest.raises(ConfigError, match=r"with another size or time.*data index"):
        stage(two, shards_of(two), tmp_path / "cache")
    main(["data", "index", str(two)])
    other = stage(two, shards_of(two), tmp_path / "cache")
    assert other.folder != first.folder
    assert load("tar", other.folder).train.labels.tolist() == [0, 1, 1, 0, 0]


def test_a_disk_that_fills_up_meanwhile_is_one_sentence_and_leaves_no_half_file(large, tmp_path):
    """The limit on a file's size stands for the full disk: the write fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
        with pytest.raises(RunError, match=r"the cache .* is full; make room there, or name"):
            stage(large, shards_of(large), tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    names = {path.name for path in tmp_path.glob("cache/*/*")}
    assert names <= {".lock", "val-0.tar", *(f"train-{n}.tar" for n in range(1, 5))}


@pytest.mark.slow
@pytest.mark.needs("slurm")  # root, and namespaces of its own for the mount
def test_on_a_full_disk_a_run_says_so_and_reads_from_the_source(two, tmp_path):
    main(["data", "index", str(two)])
    (tmp_path / "cache").mkdir()
    flags = ["--data", "tar", "--data_dir", two, "--image_size", "28", "--model", "vit_28_mini"]
    flags += ["--batch_size", "4", "--steps", "2", "--device", "cpu", "--out", tmp_path / "run"]
    train = [sys.executable, "train.py", *map(str, flags), "--data_cache", str(tmp_path / "cache")]
    mount = f"mount -t tmpfs -o size=8k none {tmp_path}/cache && exec "
    command = ["unshare", "--mount", "sh", "-c", mount + " ".join(train)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    (line,) = [line for line in log.splitlines() if "cache" in line]
    assert f"warning: the data are read from {two}, not from a cache" in line
    assert "GB free, but" in line
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_a_run_reads_from_its_cache_and_resumes_without_it(two, tmp_path):
    """The shards of the source are gone once the run has begun: only their index is read again."""
    main(["data", "index", str(two)])
    flags = ["--data", "tar", "--data_dir", str(two), "--image_size", "28", "--model"]
    flags += ["vit_28_mini", "--batch_size", "4", "--device", "cpu", "--out", str(tmp_path / "run")]
    cache = ["--data_cache", str(tmp_path / "cache")]
    stage(two, shards_of(two), tmp_path / "cache")
    for path in two.glob("*.tar"):
        os.truncate(path, 0)
    assert main(["train", *flags, *cache, "--steps", "2"]) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "unreadable" not in log and "warning" not in log
    assert "uncached" not in json.loads((tmp_path / "run" / "summary.json").read_text())
    (folder,) = (tmp_path / "cache").iterdir()
    for path in folder.glob("*.tar"):
        shutil.copy2(path, two)
    assert main(["train", *flags, "--steps", "3", "--resume", "auto"]) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "data_cache is None, was" in log and "have changed" not in log


def damage(path: Path) -> None:
    """One bit of a picture; size and time stay."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(700)
        (byte,) = file.read(1)
        file.seek(700)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.filterwarnings("ignore:cannot read")
def test_a_file_whose_bytes_are_not_those_packed_is_not_copied_and_training_goes_on(
    packed, tmp_path, capsys
):
    damage(packed / "train-000000.tar")
    cache = tmp_path / "cache"
    assert main(["data", "stage", str(packed), str(cache)]) == 1
    said = capsys.readouterr().err
    assert re.search(r"train-000000\.tar, as \S+ reads it, must have the checksum", said)
    assert not list(cache.rglob("train-*")) and len(list(cache.rglob("val-000000.tar"))) == 1
    flags = ["--data", "tar", "--data_dir", str(packed), "--data_cache", str(cache)]
    flags += ["--image_size", "28", "--model", "vit_28_mini", "--batch_size", "4", "--steps", "1"]
    assert main(["train", *flags, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    uncached = json.loads((tmp_path / "run" / "summary.json").read_text())["uncached"]
    assert re.search(rf"read from {packed}, .*must have the checksum", uncached[HOST])
    assert log.count(f"warning: {uncached[HOST]}") == 1


def test_indices_without_checksums_are_staged_and_checksums_may_be_added(two, tmp_path, capsys):
    main(["data", "index", str(two)])
    cache = tmp_path / "cache"
    assert main(["data", "stage", str(two), str(cache)]) == 0
    said = capsys.readouterr().out
    assert "; 3 files have no checksum to compare: dist-looksam data index" in said
    assert main(["data", "index", str(two), "--checksums"]) == 0
    assert main(["data", "stage", str(two), str(cache)]) == 0
    said = capsys.readouterr().out
    assert "no checksum" not in said and " 0 of them copied now" in said
    for place in (two, stage(two, shards_of(two), cache).folder):
        rows = json.loads((place / ".index-train.json").read_text())["shards"]
        crcs = [zlib.crc32((two / row["name"]).read_bytes()) for row in rows]
        assert [row["crc32"] for row in rows] == crcs
    os.utime(two / "train-000000.tar", (1, 1))
    main(["data", "index", str(two)])  # keeps the checksums of files with the same size and time
    rows = json.loads((two / ".index-train.json").read_text())["shards"]
    assert ["crc32" in row for row in rows] == [False, True]


def test_a_cache_of_data_without_shards_is_refused(tree, capsys):
    flags = ["--data", "folder", "--data_dir", str(tree), "--data_cache", "/tmp/x", "--dry_run"]
    assert main(["train", *flags]) == 2
    assert "data_cache is of --data tar" in capsys.readouterr().err
