import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image

from dist_looksam.data import load
from dist_looksam.data.pictures import centre, random
from dist_looksam.errors import ConfigError


def fetch(source, indices, *, train: bool = False, keys=None):
    indices = torch.as_tensor(indices)
    return source.fetch(indices, indices if keys is None else torch.as_tensor(keys), train)


def test_a_tree_is_read_in_the_order_of_names(tree: Path):
    data = load("folder", tree, image_size=32)
    assert data.train.class_names == ("cat", "dog") and data.shape == (3, 32, 32)
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6 and len(data.test) == 6
    assert [Path(data.train.path(i)).name for i in range(6)] == [f"{i}.jpg" for i in range(6)]
    images, labels = fetch(data.train, [7, 0])
    assert labels.tolist() == [1, 0] and images.dtype == torch.uint8
    for image, seed in zip(images, (7, 0)):
        middle = picture(seed).resize((32, 32), Image.Resampling.BILINEAR, box=centre(80, 60))
        expected = torch.from_numpy(np.array(middle)).permute(2, 0, 1)
        assert (image.float() - expected.float()).abs().mean() < 3  # JPEG's own loss


@pytest.mark.parametrize("name", ["validation", "test"])
def test_the_test_split_may_have_other_names(tree: Path, name: str):
    (tree / "val").rename(tree / name)
    assert len(load("folder", tree).test) == 6


def test_files_that_are_no_images_or_hidden_are_left_out(tree: Path):
    (tree / "train" / "cat" / "notes.txt").write_text("x")
    (tree / "train" / "cat" / "._0.jpg").write_text("x")
    (tree / "train" / ".cache").mkdir()
    picture(0).save(tree / "train" / "cat" / "ünïcode.PNG")
    source = load("folder", tree).train
    assert len(source) == 13
    assert Path(source.path(6)).name == "ünïcode.PNG"


def test_a_class_without_test_images_keeps_its_number(tree: Path):
    shutil.rmtree(tree / "val" / "cat")
    assert load("folder", tree).test.labels.tolist() == [1, 1, 1]


def break_no_dir(tree: Path) -> Path:
    return tree / "missing"


def break_no_train(tree: Path) -> Path:
    shutil.rmtree(tree / "train")
    return tree


def break_no_val(tree: Path) -> Path:
    shutil.rmtree(tree / "val")
    return tree


def break_empty_class(tree: Path) -> Path:
    (tree / "train" / "emu").mkdir()
    return tree


def break_unknown_class(tree: Path) -> Path:
    shutil.copytree(tree / "val" / "dog", tree / "val" / "emu")
    return tree


def break_flat(tree: Path) -> Path:
    shutil.rmtree(tree / "train")
    (tree / "train").mkdir()
    picture(0).save(tree / "train" / "0.jpg")
    return tree


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda tree: None, "needs --data_dir, got none"),
        (break_no_dir, "missing' is not a folder"),
        (break_no_train, "no folder train; put"),
        (break_no_val, "no folder val, validation or test; put"),
        (break_empty_class, r"emu holds no image .*; add images or remove"),
        (break_unknown_class, "class 'emu' is in .*val but not in .*train;"),
        (break_flat, "train has no class folders; put"),
    ],
)
def test_a_malformed_tree_is_one_sentence_that_says_what_to_do(tree: Path, damage, says: str):
    with pytest.raises(ConfigError, match=says) as error:
        load("folder", damage(tree))
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


@pytest.mark.parametrize("augment", ["crop", "src", "flip", "randaugment", "auto"])
def test_augmentation_of_a_file_depends_on_its_key_alone(tree: Path, augment: str):
    source = load("folder", tree, image_size=32, augment=augment).train
    same = [3] * 16
    images, _ = fetch(source, same, train=True, keys=range(16))
    plain, _ = fetch(source, same)
    assert not images.equal(plain)
    alone = [fetch(source, [3], train=True, keys=[key])[0] for key in range(16)]
    assert images.equal(torch.cat(alone))
    other = load("folder", tree, image_size=32, augment=augment, seed=1).train
    assert not images.equal(fetch(other, same, train=True, keys=range(16))[0])


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (32, 32), (1000, 10), (10, 1000), (1, 1)]
)
def test_random_regions_fit_and_keep_to_their_area_and_ratio(width: int, height: int):
    rng = np.random.default_rng(0)
    areas, ratios, places, ends = [], [], [], set()
    for _ in range(500):
        left, top, right, bottom = random(width, height, rng.random(22).tolist())
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
        w, h = right - left, bottom - top
        ratios.append(math.log(w / h))
        places.append(((left + 0.5) / (width - w + 1), (top + 0.5) / (height - h + 1)))
        ends |= {("left", left == 0), ("right", right == width)} if w < width else set()
        ends |= {("top", top == 0), ("bottom", bottom == height)} if h < height else set()
        if min(width, height) > 100:
            assert abs(ratios[-1]) < math.log(4 / 3) + 0.02
            assert areas[-1] > 0.079
    if width == 500:
        assert min(areas) < 0.1 and max(areas) > 0.9
        # Areas are uniform on 0.08..1, but a large one fits in only if its ratio is near the
        # picture's: weight min(1, -ln(a) / ln(16/9)) gives 0.432; 4 standard errors are 0.04.
        assert abs(np.mean(areas) - 0.432) < 0.04
        assert min(ratios) < -math.log(4 / 3) + 0.01 and max(ratios) > math.log(4 / 3) - 0.01
        assert len(ends) == 8
        assert abs(np.corrcoef(places, rowvar=False)[0, 1]) < 0.22  # 5 standard deviations
