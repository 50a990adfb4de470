"""--augment_on device: the pixels of the host's route, to the bit, of any micro-batch."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image

from dist_looksam.backends.batches import split
from dist_looksam.data import TrainLoader, load, on_device
from dist_looksam.data.augment import Augment, parse
from dist_looksam.data.batch import Batch
from dist_looksam.data.batchwise import BATCHWISE
from dist_looksam.data.policies import OPERATIONS, OTHERS, apply
from dist_looksam.errors import ConfigError

FILL = (124, 116, 104)
RANGE = {"blur": (0.1, 2)} | dict.fromkeys(("shear_x", "shear_y", "sharpness"), (-1.1, 1.1))
RANGE |= {name: (0, 2) for name in OTHERS if name.endswith("times")} | {"posterize": (-1.5, 1.5)}
SPECIAL = {"rotate": (0, 3, -3, 4.5), "solarize": (0, 1, 0.5)}  # 3: by 90 degrees, as a transpose


def levels(height: int, width: int, channels: int) -> np.ndarray:
    """Twelve images: noise, pictures, of one colour, of few colours, and of low contrast."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (5, height, width, channels))
    smooth = [np.asarray(picture(n, width, height))[..., :channels] for n in range(3)]
    few = random.integers(100, 103, (2, height, width, channels))
    return np.stack([*noise, *smooth, *few, noise[0] // 9 + 70, 0 * few[0] + 77]).astype(np.uint8)


@pytest.mark.parametrize("name", [*OPERATIONS, *OTHERS])
def test_an_operation_gives_pillows_pixels_to_the_bit(name):
    for shape in [(33, 47, 3), (40, 40, 3), (8, 8, 1), (2, 3, 3)]:
        images = levels(*shape)
        low, high = RANGE.get(name, (-1, 1))
        strengths = np.random.default_rng(1).uniform(low, high, len(images))
        special = SPECIAL.get(name, ())
        strengths[: len(special)] = special
        rows = [[(name, float(s))] for s in strengths]
        batch = torch.from_numpy(images).permute(0, 3, 1, 2)
        fill = FILL[: shape[2]]
        got = on_device.change(batch, on_device.arranged(rows, *shape[:2]), fill)
        for image, steps, changed in zip(images, rows, got.permute(0, 2, 3, 1).numpy()):
            picture = Image.fromarray(image if shape[2] == 3 else image[..., 0])
            made = apply(picture, steps, fill if shape[2] == 3 else fill[0])
            assert np.array_equal(changed, np.asarray(made).reshape(shape)), (steps, shape)
        if shape[0] == 33:
            assert got.equal(batch) == (name == "identity")


def batches(source, ranks: int, micro: int, workers: int) -> list[Batch]:
    """Step 3 of all ranks, in the order of the stream."""
    how = {"seed": 7, "batch_size": 24, "micro_batch": micro, "ranks": ranks, "workers": workers}
    loaders = [TrainLoader(source, rank=rank, **how) for rank in range(ranks)]
    steps = [loader.step(3) for loader in loaders]
    for loader in loaders:
        loader.close()
    return sorted(chain(*steps), key=lambda batch: int(batch.keys[0]))


@pytest.mark.parametrize(
    "augment", ["crop,flip,randaugment,jitter,erasing,mixup,cutmix", "flip,trivialaugment,cutmix",
                "crop,flip,3augment,jitter"],
)  # fmt: skip
@pytest.mark.parametrize("data", ["folder", "digits"])
def test_the_batches_of_any_ranks_are_those_of_the_host(tree: Path, data: str, augment: str):
    (tree / "train" / "dog" / "1.jpg").write_bytes(b"damaged")
    how = {"data_dir": tree, "image_size": 24} if data == "folder" else {}
    how["seed"] = 7
    host, device = (load(data, augment=augment, augment_on=on, **how).train for on in
                    ("host", "device"))  # fmt: skip
    if data == "folder":
        host.on_corrupt = device.on_corrupt = lambda text: None
    wanted = torch.cat([batch.to("cpu").images for batch in batches(host, 1, 24, 0)])
    for ranks, micro, workers in [(1, 24, 2), (3, 4, 1), (2, 2, 2)]:
        found = batches(device, ranks, micro, workers)
        before = [batch.images.clone() for batch in found]
        for _ in range(2):  # both passes of a look
            assert torch.cat([batch.to("cpu").images for batch in found]).equal(wanted)
        pairs = [part for batch in found for part in split(batch, micro // 2)]  # groups of m 2
        assert torch.cat([part.to("cpu").images for part in pairs]).equal(wanted)
        assert all(batch.images.equal(old) for batch, old in zip(found, before, strict=True))
    plain = torch.cat([batch.images for batch in batches(device, 1, 24, 0)])
    assert not plain.equal(torch.cat([batch.images for batch in batches(host, 1, 24, 0)]))


def test_the_host_draws_and_does_nothing_of_what_the_device_does():
    augment = parse("crop,flip,randaugment,jitter,erasing", on="device")
    assert augment.of_host == Augment(
        crop=True, flip=True, magnitude=9, erasing=0.25, on_device=True
    )
    assert parse("crop,jitter").of_host == Augment(crop=True, jitter=0.3)


@pytest.mark.parametrize("text", ["none", "auto", "crop,flip,erasing,mixup,repeat:3"])
def test_a_list_of_which_the_device_would_do_nothing_else_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"augment_on device needs randaugment, .*; add one"):
        parse(text, auto="crop,flip", on="device")


def test_the_log_says_whether_the_pixels_are_pillows(monkeypatch):
    cpu = torch.device("cpu")
    assert on_device.note(cpu).endswith(
        f"with the pixels of Pillow {Image.__version__} on the host"
    )
    brightness, numbers = BATCHWISE["brightness"]
    other = (lambda *args: brightness(*args) | 2, numbers)
    monkeypatch.setitem(BATCHWISE, "brightness", other)
    assert "warning: " in on_device.note(cpu) and "differ" in on_device.note(cpu)
    assert "by up to 2 of 255 levels" in on_device.note(cpu)
