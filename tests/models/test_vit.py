import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dist_looksam import models
from dist_looksam.data.draws import uniform
from dist_looksam.models import vit
from dist_looksam.models.vit import kept_branches

IMAGE = (1, 28, 28)


def small(**how) -> models.ViT:
    torch.manual_seed(0)
    return models.create("vit_28_p4", num_classes=10, image_shape=IMAGE, **how)


def some(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *IMAGE, generator=g), torch.arange(n) * 7919 + 3


def test_vit_b16_has_the_published_number_of_parameters_less_its_class_token():
    with torch.device("meta"):
        model = models.create("vit_b16", num_classes=1000, image_shape=(3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == 86_567_656 - 768 - 768


@pytest.mark.parametrize("name, millions", [("vit_ti16", 5.7), ("vit_s16", 22.1), ("vit_l16", 304)])
def test_named_sizes_are_those_of_the_papers(name, millions):
    with torch.device("meta"):
        model = models.create(name, num_classes=1000, image_shape=(3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name, shape", [("vit_28", IMAGE), ("vit_8", (1, 8, 8))])
def test_the_first_loss_is_about_that_of_guessing(name, shape):
    torch.manual_seed(0)
    model = models.create(name, num_classes=10, image_shape=shape)
    logits = model(torch.randn(64, *shape))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(64) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.1)


def test_no_matrix_starts_at_zero_because_lamb_could_not_grow_it():
    model = models.create("vit_8", num_classes=10, image_shape=(1, 8, 8))
    assert all(p.abs().min() > 0 for p in model.parameters() if p.ndim > 1)


def test_images_need_not_be_square():
    model = models.create("vit_ti16", num_classes=3, image_shape=(3, 32, 48))
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 3)


def test_images_of_other_sides_get_interpolated_positions_and_their_gradient():
    model = small()
    own = model.pos_embed
    for height, width in ((12, 20), (36, 28), (28, 28)):
        grid = height // 4, width // 4
        table = own.view(1, 7, 7, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(table, size=grid, mode="bicubic", antialias=True)
        expected = resized.permute(0, 2, 3, 1).flatten(1, 2)
        got = model._positions(height, width)
        assert torch.allclose(got, expected, atol=1e-6)
        weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
        (want,) = torch.autograd.grad((expected * weights).sum(), own)
        (grad,) = torch.autograd.grad((got * weights).sum(), own)
        assert torch.allclose(grad, want, atol=1e-5)
        assert model(torch.randn(2, 1, height, width)).shape == (2, 10)
    assert model._positions(28, 28) is own


def test_images_of_other_sides_have_the_residual_stream_in_fp32_under_autocast_too():
    """Once the resized positions, and so the whole stream, were in 16 bits until the last size."""
    model, seen = small(), []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        for side in (12, 28):
            model(torch.randn(2, 1, side, side))
    assert seen == [torch.float32, torch.float32]


def test_patches_are_squares_of_the_image_in_reading_order():
    model = models.create("vit_8", num_classes=2, image_shape=(1, 8, 8))
    cut = model._patches(torch.arange(64.0).view(1, 1, 8, 8))
    assert cut[0, 0].tolist() == [0, 1, 8, 9] and cut[0, 5].tolist() == [18, 19, 26, 27]


def test_every_parameter_but_the_key_bias_gets_a_gradient():
    model, (images, _) = small(), some(8)
    torch.nn.functional.cross_entropy(model(images), torch.arange(8)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not list(model.buffers())


def test_dropped_paths_do_not_depend_on_micro_batches_or_order():
    model, (images, keys) = small(drop_path=0.5).train(), some(12)
    whole = model(images, keys)
    parts = [model(i, k) for i, k in zip(images.split(5), keys.split(5))]
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(model(images.flip(0), keys.flip(0)).flip(0), whole)


def test_a_second_pass_drops_the_same_paths_whatever_torch_drew_in_between():
    model, (images, keys) = small(drop_path=0.5).train(), some(12)
    first = model(images, keys)
    torch.rand(17)
    assert torch.equal(model(images, keys), first)
    assert not torch.equal(model(images, keys + 100), first)


def test_drop_path_by_keys_compiles_into_one_graph():
    model, (images, keys) = small(drop_path=0.5).train(), some(4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images, keys), model(images, keys))


def test_every_branch_of_every_block_drops_samples_of_its_own():
    """The two branches of the first block never drop, those of the last at the full rate."""
    model = small(drop_path=0.5).train()
    kept = model._kept(64, torch.arange(64), torch.device("cpu"))
    assert kept.shape == (8, 64) and kept.dtype == torch.float32
    assert torch.equal(kept[:2], torch.ones(2, 64))
    assert len({tuple(row.tolist()) for row in kept[2:]}) == 6
    torch.testing.assert_close(kept.amax(1), torch.tensor([1, 1, 1.2, 1.2, 1.5, 1.5, 2, 2]))


def test_branches_are_dropped_as_by_one_draw_each():
    """All are drawn at once; the numbers are those of one draw for each branch."""
    keys, rates = torch.arange(50, 60), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    kept = kept_branches(10, rates, keys)
    for i, rate in enumerate(rates.tolist()):
        draw = uniform(0, keys, vit._FIRST_STREAM + i)
        assert torch.equal(kept[i], (draw >= rate).float() / (1 - rate))


@pytest.mark.parametrize("keys", [torch.arange(20_000), None])
def test_drop_path_keeps_the_mean_and_drops_at_its_rate(keys):
    torch.manual_seed(0)
    kept = kept_branches(20_000, torch.tensor([0.0, 0.3], dtype=torch.float64), keys)
    assert torch.equal(kept[0], torch.ones(20_000))
    assert (kept[1] == 0).float().mean().item() == pytest.approx(0.3, abs=0.015)  # 4 sigma
    assert kept[1].mean().item() == pytest.approx(1.0, abs=0.02)


def test_evaluation_drops_nothing():
    model, (images, keys) = small(drop_path=0.9).eval(), some(4)
    assert torch.equal(model(images, keys), small().eval()(images))


@pytest.mark.parametrize("name, shape", [("vit_28", IMAGE), ("vit_ti16", (3, 64, 32))])
def test_the_flop_formula_counts_what_torch_counts(name, shape):
    model = models.create(name, num_classes=10, image_shape=shape).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # the fused one is not counted
        model(torch.zeros(1, *shape))
    assert models.flops_per_image(model, shape) == counter.get_total_flops()


def test_a_narrow_vit_learns_digits_within_40_steps():
    """With every weight started at std 0.02 this reached 20 %: narrow models hardly learned."""
    digits = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 8 - 1
    labels = torch.tensor(digits.target)[order]
    torch.manual_seed(0)
    model = models.create("auto", num_classes=10, image_shape=(1, 8, 8)).train()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(40):
        rows = (torch.arange(128) + step * 128) % 1500
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    right = model.eval()(images[1500:]).argmax(1) == labels[1500:]
    assert right.float().mean() > 0.6
