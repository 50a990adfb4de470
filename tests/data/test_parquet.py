"""Parquet in Hugging Face's layout: read by row group, packed, refused in one sentence."""

from concurrent.futures import ThreadPoolExecutor

import parquets
import pytest
import torch
from pictures import jpeg

from dist_looksam.cli.main import main
from dist_looksam.data import load, parquet
from dist_looksam.data.blocks import BlockOrder, Blocks
from dist_looksam.errors import ConfigError

pytestmark = pytest.mark.needs("pyarrow")


@pytest.fixture
def hub(tree, tmp_path):
    """The tree's pictures in two files a split, three or two row groups each."""
    return parquets.of_folder(tree, tmp_path / "hub")


def indexed(where):
    assert main(["data", "index", str(where)]) == 0
    return where


def test_rows_are_the_pictures_labels_and_classes_of_their_folder(tree, hub):
    how = {"image_size": 32, "augment": "crop,flip", "seed": 3}
    before, after = load("folder", tree, **how), load("parquet", indexed(hub), **how)
    assert after.train.class_names == before.train.class_names == ("cat", "dog")
    for a, b, count in ((before.train, after.train, 12), (before.test, after.test, 6)):
        i = torch.arange(count).flip(0)
        for x, y in zip(a.fetch(i, i + 9, True), b.fetch(i, i + 9, True), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("flags", [[], ["--shuffle", "5"]])
def test_a_packed_parquet_is_the_packed_folder(tree, hub, tmp_path, flags):
    """Mixed, it is packed in order first: a row at random costs its whole row group."""
    for source, name in ((tree, "a"), (hub, "b")):
        assert main(["data", "pack", str(source), str(tmp_path / name), *flags]) == 0
    for path in (tmp_path / "a").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert names[0] == names[1]
    again = main(["data", "pack", str(hub), str(tmp_path / "b"), *flags])
    assert again == 0 and not (tmp_path / "b" / ".in_order").exists()


def test_the_block_order_reads_each_row_group_once_by_many_threads(tmp_path):
    """300 rows in groups of 10: in the full order, with room for a few, nearly every row reads."""
    pictures, labels = [jpeg(n) for n in range(300)], [n * 7 % 3 for n in range(300)]
    for name in ("train", "test"):
        parquets.write(tmp_path / f"{name}.parquet", pictures, labels, group=10)
    source = load("parquet", indexed(tmp_path), image_size=8).train
    rows = BlockOrder(300, 0, Blocks(10, 5, 2)).permutation(0)
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda part: source.fetch(part, part, False)[1], rows.split(20))
    assert torch.cat([*parts]).tolist() == [labels[n] for n in rows]
    assert source.groups_read == 30


def test_row_groups_beyond_the_limit_of_memory_are_forgotten(tmp_path, monkeypatch):
    for name in ("train", "test"):
        parquets.write(tmp_path / f"{name}.parquet", [b"x" * 1000] * 12, [0, 1] * 6, group=2)
    data = load("parquet", indexed(tmp_path))
    monkeypatch.setattr(parquet, "_KEPT", 6000)
    for _ in range(2):
        for n in range(0, 12, 2):
            assert len(data.train.encoded(n)) == 1000
    assert data.train.groups_read == 12 and len(data.train._groups) <= 3
    data.train.encoded(11)
    assert data.train.groups_read == 12
    assert "a row group of 2 images is read for each image" in parquet.advice(data.train, None)[0]
    assert parquet.advice(data.train, Blocks(2, 2, 1)) == ()


def test_layouts_that_differ_between_files_are_read(tmp_path):
    """Extra columns in some files, large binaries, names as labels, a file without a row."""
    pictures = [jpeg(n) for n in range(4)]
    parquets.write(
        tmp_path / "train-0.parquet", pictures, ["dog", "cat", "dog", "cat"], image="img"
    )
    parquets.write(tmp_path / "train-1.parquet", pictures[:1], ["cat"], width=[5])
    parquets.write(tmp_path / "train-2.parquet", [], [])
    parquets.write(tmp_path / "validation.parquet", pictures[:2], ["dog", "cat"], label="cls")
    parquets.write(tmp_path / "test.parquet", pictures[:2], [-1, -1])
    data = load("parquet", indexed(tmp_path), image_size=8)
    assert data.train.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [1, 0, 1, 0, 0] and data.test.labels.tolist() == [1, 0]
    assert data.train.encoded(4) == pictures[0] and data.train.encoded(3) == pictures[3]
    assert [*data.test.passed_over] == ["Parquet files beside those of validation"]


def test_two_classes_of_one_name_stay_two(tmp_path):
    """ImageNet has two cranes and two maillots."""
    for name in ("train", "val"):
        parquets.write(
            tmp_path / f"{name}.parquet", [jpeg(0)] * 3, [0, 1, 2], names=["a", "b", "a"]
        )
    assert load("parquet", indexed(tmp_path)).train.class_names == ("a 0", "b", "a 2")


@pytest.mark.parametrize("names", [["bee", "cat"], ["cat", "bee", "ant"], ["ant", "bee"]])
@pytest.mark.parametrize("file", ["train-2.parquet", "validation-1.parquet"])
def test_files_with_other_lists_of_classes_are_refused(names, file, tmp_path, capsys):
    """A label is a place in its own file's list; read by another list it is another class."""
    every = ["ant", "bee", "cat"]
    for name in ("train-1.parquet", "train-2.parquet", "validation-1.parquet"):
        parquets.write(tmp_path / name, [jpeg(0)] * 3, [0, 1, 2], names=every)
    parquets.write(tmp_path / file, [jpeg(0)] * 2, [0, 1], names=names)
    assert main(["data", "index", str(tmp_path)]) == 2
    says = capsys.readouterr().err
    assert "the same classes in the same order" in says and str(tmp_path / file) in says
    parquets.write(tmp_path / file, [jpeg(0)] * 2, [0, 1])  # a file that names none has the others'
    assert load("parquet", indexed(tmp_path)).train.class_names == tuple(every)


WRONG = {
    "cut": (lambda w: (w / "train.parquet").write_bytes(b"PAR1"), "Parquet file must be whole"),
    "label -1": (lambda w: parquets.write(w / "train.parquet", [b"x"], [-1]), "got -1 in"),
    "no label": (lambda w: parquets.write(w / "train.parquet", [b"x"], [None]), "got None in"),
    "a path alone": (
        lambda w: parquets.write(w / "train.parquet", [None, b"x"], [0, 1]), "with a path alone"),
    "no pictures": (
        lambda w: parquets.write(w / "train.parquet", [b"x"], [0], image="x"), "a column image"),
    "no labels": (
        lambda w: parquets.write(w / "train.parquet", [b"x"], [0], label="x"), "a column label"),
    "a gap": (lambda w: parquets.write(w / "train.parquet", [b"x"] * 2, [0, 2]), "without a gap"),
    "a file is missing": (
        lambda w: parquets.write(w / "train-00000-of-00002.parquet", [b"x"], [0]),
        "all 2 of .*got 1 and no number 1"),
    "no validation": (lambda w: (w / "val.parquet").unlink(), "got none of val"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file_is_one_sentence(name, tmp_path, capsys):
    for split in ("train", "val"):
        parquets.write(tmp_path / f"{split}.parquet", [b"x"] * 2, [0, 1])
    change, says = WRONG[name]
    change(tmp_path)
    assert main(["data", "index", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ConfigError, match=says):
        parquet.write_index(tmp_path)


def test_a_row_without_bytes_is_unreadable_and_named(tmp_path):
    parquets.write(tmp_path / "train.parquet", [jpeg(0), b"", jpeg(1)], [0, 1, 1])
    parquets.write(tmp_path / "val.parquet", [jpeg(0)], [0])
    train = load("parquet", indexed(tmp_path), image_size=8).train
    train.on_corrupt = [].append
    assert train.fetch(torch.arange(3), torch.arange(3), False)[1].tolist() == [0, -100, 1]
    assert "train.parquet, row 1 of row group 0" in next(iter(train.unreadable))


def test_staged_files_are_read(hub, tmp_path, capsys):
    assert main(["data", "stage", str(indexed(hub)), str(tmp_path / "cache")]) == 0
    (folder,) = (tmp_path / "cache").iterdir()
    one, other = load("parquet", hub).train, load("parquet", folder).train
    assert one.encoded(11) == other.encoded(11) and one.digest() == other.digest()


def test_files_with_other_pictures_are_other_data(tmp_path):
    """Rows and labels are the same: the index alone would not differ."""
    for where, data in (("a", [b"x", b"y"]), ("b", [b"x", b"longer"])):
        for split in ("train", "val"):
            parquets.write(tmp_path / where / f"{split}.parquet", data, [0, 1])
    a, b = (load("parquet", indexed(tmp_path / where)).train for where in "ab")
    assert a.index.digest == b.index.digest and a.digest() != b.digest()
