"""--augment_on device on a GPU: Pillow's pixels to the bit, and no wait of the host."""

import pytest
import torch

from dist_looksam.data import on_device
from dist_looksam.data.augment import parse
from dist_looksam.data.batch import Batch

pytestmark = pytest.mark.needs("cuda")
DEVICE = torch.device("cuda")


def batch_of(number: int, augment: str) -> Batch:
    """64 images of noise, half of them of low contrast, in page-locked memory."""
    draw = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (64, 40, 40, 3), generator=draw, dtype=torch.uint8)
    images[::2] = images[::2] // 4 + 90
    keys = torch.arange(64) + 64 * number
    done = on_device.draw(parse(augment, on="device"), 0, keys, height=40, width=40)
    return Batch(
        images=images.permute(0, 3, 1, 2),
        labels=torch.zeros(64, dtype=torch.int64),
        keys=keys,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        fill=(124, 116, 104),
        **done._asdict(),
    ).pin()


def test_operations_on_a_gpu_give_pillows_pixels():
    assert "with the pixels of Pillow" in on_device.note(DEVICE)


@pytest.mark.parametrize("augment", ["randaugment:9x3,jitter", "trivialaugment", "3augment,jitter"])
def test_a_batch_on_a_gpu_is_that_of_the_cpu_and_the_host_waits_for_nothing(augment):
    batch_of(0, augment).to(DEVICE)  # constants are copied once
    batches = [batch_of(number, augment) for number in (1, 2)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = [batch.to(DEVICE) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, there in zip(batches, moved, strict=True):
        found, wanted = there.images.cpu(), batch.to("cpu").images
        levels = ((images * 0.25 + 0.5).mul(255).round() for images in (found, wanted))
        assert torch.equal(*levels)
