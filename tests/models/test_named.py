import sys
import types

import pytest
import torch
from torch import nn

from dist_looksam import models
from dist_looksam.errors import ConfigError


@pytest.mark.parametrize(
    "shape, name",
    [
        ((1, 8, 8), "vit_8"),
        ((1, 28, 28), "vit_28"),
        ((3, 32, 32), "vit_28_p4"),
        ((3, 224, 224), "vit_s16"),
        ((3, 384, 224), "vit_s16"),
    ],
)
def test_auto_takes_the_size_made_for_the_images(shape, name):
    assert models.resolve("auto", shape) == name


def test_auto_says_which_images_it_could_take():
    with pytest.raises(ConfigError, match=r"no ViT for 27x27 images.*resize"):
        models.create("auto", num_classes=2, image_shape=(1, 27, 27))


def test_images_that_the_patch_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match="16x16 patches, got 28x28"):
        models.create("vit_b16", num_classes=2, image_shape=(1, 28, 28))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_drop_path_that_is_no_rate_is_refused(rate):
    with pytest.raises(ConfigError, match=r"drop_path must be in \[0, 1\), got"):
        models.create("vit_28", num_classes=2, image_shape=(1, 28, 28), drop_path=rate)


def test_an_unknown_name_lists_ours_and_says_that_timm_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"auto, vit_ti16, .*, got 'vitt'.*not installed.*pip"):
        models.create("vitt", num_classes=2, image_shape=(1, 28, 28))


def test_a_timm_whose_torchvision_is_of_another_torch_says_so(tmp_path, monkeypatch):
    """Importing it raises RuntimeError, which looked like a bug of ours."""
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ConfigError, match=r"does not import \(operator nms does not exist\) here"):
        models.create("resnet18", num_classes=2, image_shape=(3, 64, 64))


class Convolutional(nn.Module):
    """Takes any image size, as timm's ResNets do, and so no img_size."""

    def __init__(self, num_classes: int, drop_path_rate: float, in_chans: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, num_classes, 3)

    def forward(self, images):
        return self.conv(images).mean((2, 3))


class Sized(Convolutional):
    def __init__(self, img_size: tuple[int, int], **how) -> None:
        super().__init__(**how)
        self.img_size = img_size


@pytest.fixture
def timm(monkeypatch):
    """A timm of two models, with the calls of the real one that we use."""
    table = {"resnet9": Convolutional, "vit_real": Sized}
    fake = types.ModuleType("timm")
    fake.__version__ = "1.0"  # type: ignore[attr-defined]
    fake.is_model = table.__contains__  # type: ignore[attr-defined]
    fake.create_model = lambda name, **how: table[name](**how)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", fake)


def test_a_timm_model_comes_as_timm_made_it(timm):
    model = models.create("vit_real", num_classes=5, image_shape=(3, 32, 48), drop_path=0.1)
    assert type(model) is Sized and model.img_size == (32, 48)
    assert list(model.state_dict()) == ["conv.weight", "conv.bias"]


def test_a_timm_model_without_image_size_works_too(timm):
    model = models.create("resnet9", num_classes=5, image_shape=(3, 32, 32))
    assert models.call(model, torch.zeros(2, 3, 32, 32), torch.arange(2)).shape == (2, 5)


def test_a_name_that_timm_does_not_know_either_says_so(timm):
    with pytest.raises(ConfigError, match=r"installed timm 1\.0, got 'vitt'"):
        models.create("vitt", num_classes=2, image_shape=(1, 28, 28))


def test_flops_of_a_foreign_model_are_counted_and_its_mode_is_put_back(timm):
    model = models.create("resnet9", num_classes=5, image_shape=(3, 8, 8)).train()
    assert models.flops_per_image(model, (3, 8, 8)) == 2 * 5 * 27 * 36
    assert model.training


class Wrapper(nn.Module):
    """What DDP and DeepSpeed look like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


def test_keys_reach_our_vit_through_wrappers():
    model = models.create("vit_8", num_classes=2, image_shape=(1, 8, 8))
    assert models.takes_keys(Wrapper(Wrapper(model)))
    assert models.takes_keys(torch.compile(model, backend="eager"))
    assert not models.takes_keys(Wrapper(nn.Linear(2, 2)))
