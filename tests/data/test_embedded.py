import gzip
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from dist_looksam.data import load
from dist_looksam.errors import ConfigError

SIZES = {"train": 20, "t10k": 6}


def write_fashion(folder: Path) -> Path:
    """The four files with the right names and format, and few, made-up images."""
    for stem, count in SIZES.items():
        pixels = torch.arange(count * 28 * 28).to(torch.uint8).numpy().tobytes()
        images = (
            bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28)) + pixels
        )
        labels = (
            bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(i % 10 for i in range(count))
        )
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder


def test_digits_splits_are_fixed_disjoint_and_scaled_to_bytes():
    data, again = load("digits", seed=0), load("digits", seed=5)
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.shape == (1, 8, 8) and data.num_classes == 10
    images, labels = data.train.fetch(torch.arange(1437), torch.arange(1437), train=True)
    assert images.dtype == torch.uint8 and images.max() == 255 and images.min() == 0
    assert images.equal(again.train.fetch(torch.arange(1437), torch.arange(1437), train=True)[0])
    assert labels.equal(data.train.labels) and labels.bincount().min() > 120
    scaled = images.double() / 255
    assert abs(scaled.mean() - data.train.mean[0]) < 1e-3
    assert abs(scaled.std() - data.train.std[0]) < 1e-3
    everything = torch.cat([images, data.test.fetch(*[torch.arange(360)] * 2, train=False)[0]])
    assert everything.flatten(1).unique(dim=0).shape[0] == 1797
    theirs = load_digits()
    seen = torch.cat([everything.flatten(1), torch.cat([labels, data.test.labels])[:, None]], 1)
    pixels = torch.from_numpy(theirs.data / 16 * 255).round().to(torch.uint8)
    want = torch.cat([pixels, torch.from_numpy(theirs.target)[:, None]], 1)
    assert seen.unique(dim=0).equal(want.unique(dim=0))  # each digit with its own label


def test_enlarged_digits_are_the_digits_in_the_same_order():
    data, small = load("digits_28", seed=3), load("digits")
    assert data.shape == (1, 28, 28) and data.train.class_names == small.train.class_names
    for large, few in ((data.train, small.train), (data.test, small.test)):
        assert large.labels.equal(few.labels)
        means = large.images.double().mean((1, 2, 3)) - few.images.double().mean((1, 2, 3))
        assert means.abs().max() < 0.2  # of 255, by rounding
        corners = (
            large.images[:, 0, ::9, ::9].double()
            - few.images[:, 0, [0, 2, 5, 7]][..., [0, 2, 5, 7]].double()
        )
        assert corners.abs().mean() < 30
    scaled = data.train.images.double() / 255
    assert abs(scaled.mean() - data.train.mean[0]) < 1e-3
    assert abs(scaled.std() - data.train.std[0]) < 1e-3


def test_fashion_mnist_is_read_from_its_four_files(tmp_path: Path):
    data = load("fashion_mnist", write_fashion(tmp_path))
    assert (len(data.train), len(data.test)) == (20, 6)
    images, labels = data.test.fetch(torch.tensor([5, 0]), torch.tensor([0, 1]), train=False)
    assert images.shape == (2, 1, 28, 28) and labels.tolist() == [5, 0]
    expected = torch.arange(6 * 28 * 28).to(torch.uint8).reshape(6, 1, 28, 28)
    assert images.equal(expected[[5, 0]])


@pytest.mark.needs("fashion_mnist")
def test_the_packaged_fashion_mnist_has_its_published_size_mean_and_balance():
    data = load("fashion_mnist")
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.train.labels.bincount().tolist() == [6000] * 10
    images = data.train.fetch(torch.arange(60_000), torch.arange(60_000), train=True)[0]
    assert abs(images.float().mean() / 255 - data.train.mean[0]) < 1e-3
    assert abs(images.float().std() / 255 - data.train.std[0]) < 1e-3


@pytest.mark.parametrize("augment", ["crop", "flip", "randaugment"])
def test_augmentation_of_a_sample_depends_on_its_key_alone(augment: str):
    source = load("digits", augment=augment).train
    indices, keys = torch.zeros(64).long(), torch.arange(64)
    images, _ = source.fetch(indices, keys, train=True)
    plain, _ = source.fetch(indices, keys, train=False)
    assert not images.equal(plain) and plain.equal(plain[:1].expand_as(plain))
    alone = [source.fetch(indices[:1], keys[i : i + 1], train=True)[0] for i in range(64)]
    assert images.equal(torch.cat(alone))
    other = load("digits", augment=augment, seed=1).train.fetch(indices, keys, train=True)[0]
    assert not images.equal(other)


def test_errors_say_what_to_do(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'cifar'.*use one of fashion_mnist, digits, folder"):
        load("cifar")
    with pytest.raises(
        ConfigError, match=r"install it with 'apt-get install dataset-fashion-mnist'"
    ):
        load("fashion_mnist", tmp_path)
    with pytest.raises(ConfigError, match="digits takes no --data_dir"):
        load("digits", tmp_path)


def test_a_damaged_fashion_mnist_file_is_named(tmp_path: Path):
    path = write_fashion(tmp_path) / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ConfigError, match=r"cannot read .*t10k-labels"):
        load("fashion_mnist", tmp_path)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ConfigError, match=r"t10k-labels.* is not a whole IDX file"):
        load("fashion_mnist", tmp_path)
