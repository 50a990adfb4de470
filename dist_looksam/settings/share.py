"""A batch as the share of a data set that it is of ImageNet's."""

from collections.abc import Iterable

IMAGENET = 1_281_167  # training images


def batches(imagenet: Iterable[int], *, images: int, multiple: int = 1) -> list[int]:
    """For batches on ImageNet: the same share of `images`, to the nearest multiple, at least one.

    So equal epochs are the same number of steps, but for the rounding.
    """
    return [multiple * max(1, round(images * b / IMAGENET / multiple)) for b in imagenet]
