"""Weights of files for models with other names, classes and image sizes; layers, frozen ones."""

import re

import pytest
import torch

from dist_looksam import models
from dist_looksam.errors import ConfigError
from dist_looksam.models.named import SIZES
from dist_looksam.models.timm_form import as_timm
from dist_looksam.models.vit import Size

SHAPE = (1, 8, 8)


def vit(classes=10, shape=SHAPE, name="vit_8"):
    return models.create(name, num_classes=classes, image_shape=shape)


def fitted(model, weights, shape=SHAPE, **how):
    return models.fitted(model, weights, image_shape=shape, source="FILE", **how)


@pytest.fixture
def timm(needs):
    needs("timm")
    import timm

    return timm


def theirs(timm, *, side=32, classes=10, **how):
    """timm's VisionTransformer, with the width and depth of ViT-Ti unless `how` says others."""
    how = {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 16, **how}
    return timm.models.VisionTransformer(img_size=side, num_classes=classes, **how).eval()


def test_a_file_made_by_timm_gives_timms_own_logits(timm, tmp_path):
    """ViT-Ti over the mean of tokens, as torch.save writes it, read for our vit_ti16."""
    from dist_looksam.run import pretrained

    torch.manual_seed(1)
    want = theirs(timm, class_token=False, global_pool="avg", fc_norm=False)
    file = tmp_path / "vit_ti.pth"
    torch.save({"model": want.state_dict()}, file)
    shape = (3, 32, 32)
    model = vit(shape=shape, name="vit_ti16").eval()
    init = pretrained.read(str(file))
    found = init.fit(model, shape, tuple("0123456789"))
    model.load_state_dict(found.weights)  # all of them
    assert found.share == 1 and len(init.notes) == 1
    images = torch.randn(4, *shape)
    with torch.no_grad():
        assert (model(images) - want(images)).abs().max() < 1e-5
        assert want(images).std() > 1e-3


def test_positions_are_resampled_as_timm_does_and_the_class_tokens_is_kept(timm):
    torch.manual_seed(1)
    small = theirs(timm, side=48, embed_dim=24, depth=2)
    large = theirs(timm, side=80, embed_dim=24, depth=2, classes=3)
    torch.nn.init.normal_(small.pos_embed)
    found = fitted(large, small.state_dict(), (3, 80, 80))
    from timm.layers import resample_abs_pos_embed

    want = resample_abs_pos_embed(small.pos_embed, [5, 5], num_prefix_tokens=1)
    assert torch.allclose(found.weights["pos_embed"], want, atol=1e-6)
    assert torch.equal(found.weights["pos_embed"][:, 0], small.pos_embed[:, 0])
    assert found.resized == ((3, 3), (5, 5)) and found.head == ("head.weight", "head.bias")


def test_weights_with_and_without_a_position_of_the_class_token_compute_the_same():
    """DeiT's class token lost its position in a model of DeiT III, whose token has none."""
    how = {"patch": 2, "dim": 16, "depth": 2, "heads": 2, "class_token": True}
    torch.manual_seed(1)
    one, other, back = (
        models.ViT(Size(**how, class_position=place), num_classes=3, image_shape=SHAPE)
        for place in (True, False, True)
    )
    for model, source in ((other, one), (back, other)):
        found = fitted(model, source.state_dict())
        model.load_state_dict(found.weights)
        assert found.share == 1 and found.resized is None
        images = torch.randn(4, *SHAPE)
        assert torch.allclose(model(images), source(images), atol=1e-6)


def test_dinov2s_own_file_computes_the_same_in_a_model_whose_class_token_has_no_position():
    """Its registers have another name than timm's, and were made anew."""
    how = {"patch": 2, "dim": 16, "depth": 2, "heads": 2, "class_token": True, "registers": 3}
    torch.manual_seed(1)
    own, other = (models.ViT(Size(**how), num_classes=3, image_shape=SHAPE) for _ in range(2))
    file = as_timm(own.state_dict(), Size(**how))[0]
    file = {n: w for n, w in file.items() if not n.startswith("head.")}
    place = torch.randn(1, 1, 16)
    file["cls_token"] = file["cls_token"] - place
    file["pos_embed"] = torch.cat([place, file["pos_embed"]], 1)
    file |= {"register_tokens": file.pop("reg_token"), "mask_token": torch.zeros(1, 16)}
    found = fitted(other, file)
    assert found.new == () and found.unused == ("mask_token",)
    other.load_state_dict(found.weights, strict=False)
    other.head.load_state_dict(own.head.state_dict())
    images = torch.randn(4, *SHAPE)
    assert torch.allclose(other(images), own(images), atol=1e-6)


def test_our_names_and_timms_are_the_same_in_both_directions():
    ours = vit().state_dict()
    named, _ = as_timm(ours, SIZES["vit_8"])
    found = fitted(vit(), {f"module.{n}": w for n, w in named.items()})
    assert all(torch.equal(found.weights[n], w) for n, w in ours.items())
    assert found.notes("FILE", 10) == [f"init: {len(ours)} of {len(ours)} entries are from FILE"]


def test_other_classes_leave_the_head_new_and_another_size_interpolates():
    """A class token that the model has not is named, and so is what the file lacks."""
    weights = vit(classes=7).state_dict()
    del weights["norm.weight"]
    grid = weights["pos_embed"]
    weights |= {"cls_token": torch.zeros(1, 1, 64)}
    weights["pos_embed"] = torch.cat([torch.full((1, 1, 64), 9.0), grid], 1)
    found = fitted(vit(shape=(1, 12, 8)), weights, (1, 12, 8))
    assert found.weights["pos_embed"].shape == (1, 24, 64) and found.weights["pos_embed"].max() < 9
    text, *warnings = found.notes("FILE", 10)
    assert text.endswith(
        "; positions interpolated from 4x4 to 6x4; made anew for 10 classes: head.weight, head.bias"
    )
    assert warnings == [
        "warning: init: not in FILE, made anew: norm.weight",
        "warning: init: in FILE, not in the model: cls_token",
    ]
    same = fitted(vit(), vit().state_dict(), same_classes=False)
    assert same.head == ("head.weight", "head.bias")


@pytest.mark.parametrize("weights", [vit(name="vit_28_mini", shape=(1, 14, 14)).state_dict(), {}])
def test_a_file_of_another_model_is_refused(weights):
    with pytest.raises(ConfigError, match="init must hold weights of the model, got FILE with 0%"):
        fitted(vit(), weights)


def test_lr_falls_by_layer_from_the_head_to_the_embeddings():
    model = vit()
    scales = models.lr_scales(model, layer_decay=0.5, head_lr=3.0)
    of = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert {of["patch_embed.weight"], of["patch_embed.bias"], of["pos_embed"]} == {0.5**5}
    assert [of[f"blocks.{i}.fc1.bias"] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert (of["norm.weight"], of["head.weight"]) == (1.0, 3.0)
    assert models.lr_scales(model, layer_decay=1.0, head_lr=1.0) == {}


def test_tokens_and_layer_scale_have_the_lr_of_their_layer_and_a_stem_that_of_embeddings():
    """The stem of timm's networks whose blocks are `blocks.0`, ... had the lr of the head."""
    with torch.device("meta"):
        model = vit(name="dinov2_s14_reg4", shape=(3, 28, 28))
    model.conv_stem = torch.nn.Linear(1, 1)
    model._modules = {"conv_stem": model._modules.pop("conv_stem"), **model._modules}
    scales = models.lr_scales(model, layer_decay=0.5, head_lr=3.0)
    of = {name: scales[id(p)] for name, p in model.named_parameters()}
    first = ("cls_token", "reg_token", "pos_embed", "patch_embed.weight", "conv_stem.weight")
    assert {of[name] for name in first} == {0.5**13}
    assert (of["blocks.0.ls1.gamma"], of["blocks.11.ls2.gamma"]) == (0.5**12, 0.5)


@pytest.mark.parametrize(
    "how", [{"layer_decay": 0.5, "head_lr": 1}, {"layer_decay": 1, "head_lr": 2}]
)
def test_a_model_without_blocks_or_head_is_refused(how):
    with pytest.raises(ConfigError, match=r"(layer_decay|head_lr) needs a model .* leave it out"):
        models.lr_scales(torch.nn.Sequential(torch.nn.Linear(2, 2)), **how)


@pytest.mark.parametrize(
    "pattern, text",
    [(".", "fits all"), ("nothing", "fits none"), ("(", "must be a regular expression")],
)
def test_a_freeze_that_leaves_nothing_or_everything_is_refused(pattern, text):
    with pytest.raises(ConfigError, match=f"freeze .*{re.escape(text)}"):
        models.freeze(vit(), pattern)
