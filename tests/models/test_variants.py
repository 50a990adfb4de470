"""The published variants of ViT: timm's arithmetic and names, and all that is done with a ViT."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dist_looksam import models
from dist_looksam.backends import compiled
from dist_looksam.models.named import SIZES
from dist_looksam.models.timm_form import as_timm
from dist_looksam.models.vit import Size
from dist_looksam.optim import table
from dist_looksam.plan import workload

TIMMS = {
    "deit_ti16": "deit_tiny_patch16_224",
    "deit_b16": "deit_base_patch16_224",
    "deit3_s16": "deit3_small_patch16_224",
    "deit3_b16": "deit3_base_patch16_224",
    "deit3_l16": "deit3_large_patch16_224",
    "dinov2_s14_reg4": "vit_small_patch14_reg4_dinov2",
    "dinov2_l14_reg4": "vit_large_patch14_reg4_dinov2",
}
KINDS = ("vit_ti16", "deit_ti16", "deit3_s16", "dinov2_s14_reg4", "vit_s16_qk")
ALL = Size(
    patch=2, dim=8, depth=2, heads=2, class_token=True, registers=2, layer_scale=0.5, qk_norm=True
)


def small(name: str) -> models.ViT:
    """Two blocks, 3 x 3 patches, and no vector that is all ones or zeros."""
    size = dataclasses.replace(SIZES[name], depth=2)
    torch.manual_seed(0)
    net = models.ViT(size, num_classes=5, image_shape=(3, 3 * size.patch, 3 * size.patch))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p) * (p.ndim == 1))
    return net


def images(net: models.ViT, n: int = 2) -> torch.Tensor:
    side = 3 * net.size.patch
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def everything() -> models.ViT:
    torch.manual_seed(0)
    return models.ViT(ALL, num_classes=3, image_shape=(1, 4, 4), drop_path=0.3).train()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.needs("timm")
def test_timm_computes_the_same_logits_with_the_same_weights(name):
    import timm

    ours = small(name).eval()
    weights, call = as_timm(ours.state_dict(), ours.size)
    theirs = eval(call, {"timm": timm}).eval()
    theirs.load_state_dict(weights)
    assert torch.allclose(ours(images(ours)), theirs(images(ours)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TIMMS)
@pytest.mark.needs("timm")
def test_a_named_size_has_the_parameters_of_timms_model(name):
    import timm

    with torch.device("meta"):
        ours = models.create(name, num_classes=1000, image_shape=(3, 224, 224))
        theirs = timm.create_model(TIMMS[name], num_classes=1000, img_size=224)
    weights, _ = as_timm(ours.state_dict(), SIZES[name])
    want = {n: p.shape for n, p in theirs.state_dict().items()}
    assert {n: p.shape for n, p in weights.items()} == want


@pytest.mark.parametrize("name, parameters", [
    ("deit_b16", 86_567_656), ("deit3_s16", 22_059_496), ("deit3_b16", 86_585_320),
    ("deit3_l16", 304_374_760), ("vit_b16_qk", 86_567_656 - 2 * 768 + 12 * 4 * 64),
])  # fmt: skip
def test_a_named_size_has_the_published_number_of_parameters(name, parameters):
    """Of timm's table. Norms of q and k have a weight and a bias for each entry of a head."""
    with torch.device("meta"):
        net = models.create(name, num_classes=1000, image_shape=(3, 224, 224))
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("name", KINDS)
def test_operations_and_activations_are_those_that_torch_counts(name):
    net, counter = small(name).eval(), FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        net(images(net, 1))
    assert net.flops_per_image() == counter.get_total_flops()
    (own, stream, fp32), _, _ = workload._vit(net, 5)
    (counted, _, _), _ = workload.counted(net, images(net).shape[1:])
    assert own + stream + fp32 == pytest.approx(counted, rel=0.02)


def test_every_parameter_gets_a_gradient_and_dropped_branches_take_their_scale_along():
    net, keys = everything(), torch.arange(6)
    x = torch.randn(6, 1, 4, 4)
    nn.functional.cross_entropy(net(x, keys), keys % 3).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_gamma_is_a_vector_like_others_and_norms_of_q_and_k_are_norms():
    """No decay, so that LAMB's trust ratio is 1; perturbed by look_layer_sam as biases are."""
    net = everything()
    names = {id(p): name for name, p in net.named_parameters()}
    groups = table.groups(net, 0.1, "norms")
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert {"cls_token", "reg_token", "pos_embed"} <= decayed
    assert not any("gamma" in name or "norm" in name for name in decayed)
    moved = {names[id(p)] for g in groups if g["perturb"] for p in g["params"]}
    assert {"blocks.0.attn.q_norm.weight", "blocks.1.attn.k_norm.bias"} <= moved
    assert not any("gamma" in name for name in moved)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_compiled_and_checkpointed_blocks_have_the_same_gradients(precision):
    torch._dynamo.reset()
    counters.clear()
    x, keys = torch.randn(6, 1, 4, 4), torch.arange(6)
    grads = []
    for how in ("eager", "checkpointed", "compiled"):
        net = everything()
        if how == "checkpointed":
            models.checkpoint_activations(net)
        if how == "compiled":
            compiled.compile_blocks(net, backend="aot_eager")
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = nn.functional.cross_entropy(net(x, keys).float(), keys % 3)
        loss.backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(map(torch.equal, grads[0], grads[1]))
    for eager, other in zip(grads[0], grads[2], strict=True):
        torch.testing.assert_close(
            other, eager, rtol=0, atol=1e-6 if precision == torch.float32 else 2e-2
        )
    assert counters["stats"]["unique_graphs"] == 1 and not counters["recompiles"]
