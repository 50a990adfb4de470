"""How much of the GPUs' peak a run uses (MFU, model FLOPs utilization)."""

from collections.abc import Callable

import torch

from .. import models
from ..data import Data
from ..plan.machines import dense_peak
from ..settings import assemble
from ..settings.config import Settings


def peak_share(
    settings: Settings, data: Data, device: torch.device, *, ranks: int
) -> Callable[[int], float] | None:
    """Of a step: the share of the peak of all ranks' GPUs that one forward and backward of one of
    its images a second is. None on a CPU, and for a card that is not in `plan.machines`' table.

    Operations are those of the model, a backward counted as two forwards: recomputed activations do
    not count. Source: Chowdhery et al., arXiv:2204.02311, appendix B.
    """
    if device.type != "cuda":
        return None
    peak = dense_peak(torch.cuda.get_device_name(device), settings.precision)
    if peak is None:
        return None

    name = models.resolve(settings.model, data.shape)  # also of the smaller images of a growth

    def share(shape: tuple[int, int, int]) -> float:
        with torch.device("meta"):
            net = models.create(name, num_classes=data.num_classes, image_shape=shape)
        return 3 * models.flops_per_image(net, shape) / (peak * ranks)

    growth = assemble.growth_of(settings, data.shape)
    if growth is None:
        always = share(data.shape)
        return lambda step: always
    shares = {shape[1]: share(shape) for shape in growth.shapes(data.shape)}
    return lambda step: shares[growth.side(step)]
