"""How much of the GPUs' peak a run uses (MFU, model FLOPs utilization)."""

import torch

from .. import models
from ..data import Data
from ..plan.machines import dense_peak
from ..settings.config import Settings


def peak_share(settings: Settings, data: Data, device: torch.device, *, ranks: int) -> float | None:
    """The share of the peak of all ranks' GPUs that one forward and backward of one image a second
    is. None on a CPU, and for a card that is not in the table of `plan.machines`.

    Operations are those of the model, a backward counted as two forwards: recomputed activations do
    not count. None also if images grow. Source: Chowdhery et al., arXiv:2204.02311, appendix B.
    """
    if device.type != "cuda" or settings.image_size_from is not None:
        return None
    peak = dense_peak(torch.cuda.get_device_name(device), settings.precision)
    if peak is None:
        return None
    with torch.device("meta"):
        net = models.create(settings.model, num_classes=data.num_classes, image_shape=data.shape)
    return 3 * models.flops_per_image(net, data.shape) / (peak * ranks)
