"""--checkpoint_activations: the same gradients to the bit; of a block its input alone is kept."""

import pytest
import torch
from torch import nn

from dist_looksam import ConfigError, models
from dist_looksam.plan.workload import workload

IMAGE = (3, 32, 32)


def saved_bytes(model, images, keys=None) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(t):
        if (place := t.untyped_storage().data_ptr()) not in own:
            sizes[place] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(images, keys).sum()
    return sum(sizes.values())


def vit(checkpointed, **how):
    torch.manual_seed(0)
    model = models.create("vit_ti16", num_classes=10, image_shape=IMAGE, **how).train()
    if checkpointed:
        models.checkpoint_activations(model)
    return model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_are_the_same_to_the_bit_with_drop_path_and_in_16_bits(dtype):
    found = []
    for checkpointed in (False, True):
        model = vit(checkpointed, drop_path=0.5)
        draw = torch.Generator().manual_seed(1)
        images, keys = torch.randn(6, *IMAGE, generator=draw), torch.arange(6)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(model(images, keys).float(), torch.arange(6))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_plan_knows_what_is_kept():
    """Of the kept inputs and one block that is computed again; counted without the latter."""
    images = torch.randn(4, *IMAGE)
    whole, kept = (saved_bytes(vit(checkpointed), images) for checkpointed in (False, True))
    work = workload("vit_ti16", 10, IMAGE)
    plans = [
        work.activations(4, arithmetic=4, residual=4, checkpointed=checkpointed)
        - 4 * 4 * (work.working + work.pixels)
        for checkpointed in (False, True)
    ]
    one_block = 4 * 4 * (work.block[0] + work.block[1] // 2 + work.block[2])
    assert plans[0] == pytest.approx(whole, rel=0.02)
    assert plans[1] - one_block == pytest.approx(kept, rel=0.05)
    assert kept < whole / 8


def test_a_model_without_the_switch_is_refused():
    with pytest.raises(ConfigError, match="needs one of our models or a timm model that can, got"):
        models.checkpoint_activations(nn.Linear(2, 2))
