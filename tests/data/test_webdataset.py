"""The package webdataset reads our shards, and we read the shards it writes."""

import json

import pytest
import torch
from pictures import jpeg

from dist_looksam.cli.main import main
from dist_looksam.data import load

pytestmark = pytest.mark.needs("webdataset")


def test_webdataset_reads_our_shards_sample_by_sample(tree, packed):
    import webdataset

    ours = load("tar", packed).train
    shards = [str(path) for path in ours.index.shards]
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert [int(sample["cls"]) for sample in theirs] == ours.labels.tolist()
    assert [sample["jpg"] for sample in theirs] == [ours.encoded(n) for n in range(12)]
    (batch, *_) = (
        webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls")
    )
    assert batch[0].shape == (60, 80, 3) and batch[1] == 0


@pytest.mark.parametrize("label", ["cls", "json"])
def test_we_read_shards_that_webdataset_wrote(tmp_path, label):
    """Capitals and dots in a folder's name, several parts a sample, shards of few samples."""
    import webdataset

    written = {"train": [], "val": []}
    for split, count in (("train", 7), ("val", 3)):
        pattern = str(tmp_path / f"{split}-%06d.tar")
        with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as writer:
            for n in range(count):
                value = n % 3 if label == "cls" else {"label": n % 3, "by": "hand"}
                data = jpeg(n)
                key = f"Folder.v1/{n:06d}"
                writer.write({"__key__": key, "txt": "a text", "JPG": data, label: value})
                written[split].append((data, n % 3))
    assert main(["data", "index", str(tmp_path)]) == 0
    data = load("tar", tmp_path, image_size=16)
    for split, rows in ((data.train, written["train"]), (data.test, written["val"])):
        assert [(split.encoded(n), int(split.labels[n])) for n in range(len(split))] == rows
        everything = torch.arange(len(split))
        assert split.fetch(everything, everything, True)[1].tolist() == [c for _, c in rows]
        assert not split.unreadable and not split.passed_over
    assert len(data.train.index.shards) == 3
    shards = json.loads((tmp_path / ".index-train.json").read_text())["shards"]
    assert [row["samples"] for row in shards] == [3, 3, 1]
