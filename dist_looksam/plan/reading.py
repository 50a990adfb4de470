"""What a node must read and decode so that its GPUs do not wait for images."""

from dataclasses import dataclass
from math import ceil

from ..data.sets import data_set
from .forecast import Plan


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Of one node, a second: images and bytes.

    image_bytes  mean of an encoded image. measured: of the data; else assumed, as of ImageNet.
    cores        that decode and augment so many images; None: the machine's speed is not known.
    there        cores of a node; None: not known.
    """

    images_per_s: float
    image_bytes: float
    measured: bool
    cores: int | None
    there: int | None = None

    @property
    def bytes_per_s(self) -> float:
        return self.images_per_s * self.image_bytes

    def __str__(self) -> str:
        text = (
            f"{self.images_per_s:,.0f} images/s and {self.bytes_per_s / 1e6:,.0f} MB/s on each "
            f"node, at {self.image_bytes / 1e3:,.0f} kB an image"
            f"{'' if self.measured else ' (assumed)'}"
        )
        if self.cores is None:
            return text
        if self.there is None:
            return f"{text}; {self.cores:,} cores decode them"
        if self.cores <= self.there:
            return f"{text}; {self.cores:,} of its {self.there:,} cores decode them"
        return (
            f"{text}; {self.cores:,} cores would decode them, but it has {self.there:,}: decoding "
            f"is the limit, at {self.there / self.cores:.0%} of this speed; pack smaller pictures "
            f"(dist-looksam data pack --max_side), take a lighter --augment, or --augment_on device"
        )


def reading(planned: Plan, image_bytes: float | None = None) -> Reading | None:
    """What each node must read; None where the data are in memory.

    image_bytes: measured; by default that of the data set's size.
    """
    s = planned.settings
    size = image_bytes or data_set(s.data).size(s.image_size).image_bytes
    if not size:
        return None
    nodes = max(1.0, planned.gpus / planned.gpus_per_node)
    images, core = planned.images_per_s / nodes, planned.machine.images_per_second_per_core
    return Reading(
        images_per_s=images,
        image_bytes=size,
        measured=bool(image_bytes),
        cores=ceil(images / core) if core else None,
        there=planned.machine.cores_per_node,
    )
