"""dist-looksam data pack and check: atomic, resumable, the same bytes; damage is named."""

import io
import json
import shutil
import sys

import jpegs
import numpy as np
import pytest
from pictures import picture, write_tree
from PIL import Image

from dist_looksam.cli.main import main
from dist_looksam.data import jpeg, load
from dist_looksam.data.encoding import AGAIN, encoded
from dist_looksam.data.pictures import Pictures


def test_packing_goes_on_where_it_was_killed_and_gives_the_same_bytes(tree, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    flags = ["--shuffle", "5", "--shard_mb", "1"]
    assert main(["data", "pack", str(tree), str(whole), *flags]) == 0
    shutil.copytree(whole, again)
    (again / "val-000000.tar").rename(again / ".val-000000.tar.123.new")  # killed while writing it
    for path in again.glob(".index-*"):
        path.unlink()
    before = (again / "train-000000.tar").stat().st_mtime_ns
    assert main(["data", "pack", str(tree), str(again), *flags]) == 0
    assert (again / "train-000000.tar").stat().st_mtime_ns == before
    for path in whole.glob("*.tar"):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_packing_shuffles_training_samples_by_a_recorded_seed(tree, tmp_path):
    main(["data", "pack", str(tree), str(tmp_path / "a"), "--shuffle", "5"])
    mixed, plain = load("tar", tmp_path / "a").train, load("folder", tree).train
    order = np.random.Generator(np.random.Philox(key=5)).permutation(12)
    assert mixed.labels.tolist() == plain.labels[order].tolist() != plain.labels.tolist()
    assert all(mixed.encoded(i) == plain.encoded(int(n)) for i, n in enumerate(order))
    assert json.loads((tmp_path / "a" / "pack.json").read_text())["shuffle"] == 5


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max_side", "40"], "must be empty or of the same packing"),
        (["--shuffle", "x"], "shuffle must be a seed"),
        (["--max_side", "0"], "max_side must be from 1"),
        (["--shard_mb", "0"], "shard_mb must be from 1"),
    ],
)
def test_other_settings_for_a_packed_folder_are_refused(tree, packed, flags, says, capsys):
    assert main(["data", "pack", str(tree), str(packed), *flags]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_with_other_tar_files_is_not_written_to(tree, two, capsys):
    assert main(["data", "pack", str(tree), str(two)]) == 2
    assert "target must be empty" in capsys.readouterr().err


def test_max_side_reduces_the_shorter_side_and_turns_pictures_upright(tmp_path):
    tree = write_tree(tmp_path / "pictures", train=2, val=1)
    turned = picture(0, 120, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tree / "train/cat/0.jpg", exif=exif)
    picture(1, 30, 20).save(tree / "train/cat/1.jpg")
    (tree / "train/dog/0.jpg").write_bytes(b"\xff\xd8 damaged")
    before = load("folder", tree).train
    main(["data", "pack", str(tree), str(tmp_path / "a"), "--max_side", "40"])
    after = load("tar", tmp_path / "a").train
    sizes = [Image.open(io.BytesIO(after.encoded(i))).size for i in (0, 1)]
    assert sizes == [(40, 80), (30, 20)]
    assert after.encoded(1) == before.encoded(1) and after.encoded(2) == b"\xff\xd8 damaged"


@pytest.fixture
def progressive(tmp_path):
    """A tree with three progressive JPEGs: one turned by its EXIF, one damaged."""
    tree = write_tree(tmp_path / "pictures", train=3, val=1)
    for n, exif in ((0, jpegs.exif(6)), (1, jpegs.exif(1)), (2, jpegs.exif(1))):
        picture(n).save(tree / f"train/cat/{n}.jpg", progressive=True, exif=exif)
    data = (tree / "train/cat/2.jpg").read_bytes()
    (tree / "train/cat/2.jpg").write_bytes(data[: len(data) // 2])
    return tree


def opened(source: Pictures, index: int) -> Image.Image:
    return Image.open(io.BytesIO(source.encoded(index)))


@pytest.mark.needs("jpeg_in_c")
def test_progressive_jpegs_become_baseline_without_loss(progressive, tmp_path, capsys):
    target = tmp_path / "a"
    for _ in range(2):  # the second time from the record of the first
        assert main(["data", "pack", str(progressive), str(target)]) == 0
        said = capsys.readouterr().out
        assert "of 3 progressive JPEGs 2 became baseline without loss, 1 stay as they are" in said
    before, after = load("folder", progressive).train, load("tar", target).train
    for n in (0, 1):
        a, b = opened(before, n), opened(after, n)
        assert "progressive" in a.info and "progressive" not in b.info
        assert a.getexif() == b.getexif() and np.array_equal(a, b)
    assert all(before.encoded(n) == after.encoded(n) for n in (2, 3, 4, 5))


def test_without_the_c_extension_progressive_jpegs_are_encoded_again(
    progressive, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv(jpeg.SWITCH, "python")
    assert main(["data", "pack", str(progressive), str(tmp_path / "a")]) == 0
    assert "of 3 progressive JPEGs 2 were encoded again, as the C" in capsys.readouterr().out
    before, after = load("folder", progressive).train, load("tar", tmp_path / "a").train
    for n in (0, 1):
        a, b = opened(before, n), opened(after, n)
        assert "progressive" not in b.info and a.getexif() == b.getexif()
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).mean() < 1


@pytest.mark.needs("jpeg_in_c")
def test_the_smoothing_of_a_progressive_jpeg_without_its_last_scans_is_kept():
    """Decoders smooth such pictures; their coefficients alone would give blocks."""
    image = Image.fromarray(jpegs.levels(np.random.default_rng(5), 200, 150))
    data = jpegs.encode(image, progressive=True)
    for _ in range(5):
        data = data[: data.rindex(b"\xff\xda")]
    data += b"\xff\xd9"
    made = encoded(data, None)
    a, b = (np.asarray(Image.open(io.BytesIO(d)), int) for d in (data, made.data))
    assert made.progressive == AGAIN and np.abs(a - b).mean() < 1


def test_check_decodes_whole_pictures_and_names_the_damaged_ones(tree, packed, tmp_path, capsys):
    """A decoder of a region does not see damage below it."""
    assert main(["data", "check", str(packed)]) == main(["data", "check", str(tree)]) == 0
    data = (tree / "train/dog/3.jpg").read_bytes()
    (tree / "train/dog/3.jpg").write_bytes(data[: int(0.7 * len(data))])
    main(["data", "pack", str(tree), str(tmp_path / "again")])
    capsys.readouterr()
    for place in (tree, tmp_path / "again"):
        assert main(["data", "check", str(place)]) == 1
        told = capsys.readouterr().out
        assert "1 are damaged" in told and told.count("truncated") == 1


def test_packed_shards_can_be_packed_again(packed, tmp_path):
    assert main(["data", "pack", str(packed), str(tmp_path / "more"), "--shuffle", "1"]) == 0
    a, b = load("tar", packed).train, load("tar", tmp_path / "more").train
    assert sorted(map(a.encoded, range(12))) == sorted(map(b.encoded, range(12)))
    assert a.class_names == b.class_names


def test_without_pyarrow_parquet_is_one_sentence(tmp_path, monkeypatch, capsys):
    """`None` in sys.modules makes an import fail as it does where the package is not installed."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("train", "val"):
        (tmp_path / f"{name}.parquet").touch()
    assert main(["data", "index", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs the package pyarrow, got none; install it: pip install" in line
