"""Weights rounded to a few bits, as quantised inference stores them."""

from torch import Tensor, where


def rounded(weight: Tensor, *, bits: int) -> Tensor:
    """The nearest weights that `bits`-bit integers with one scale per output channel can store.

    weight  [channels, ...]. With n = 2^(bits - 1) - 1 (127 of int8, 7 of int4), channel c has the
            scale s = max |w_c| / n; its entries become s x round(w / s), integers in [-n, n] with
            halves to even. The zero is exact; -n - 1 is not used. A channel of zeros stays.
    """
    most = 2 ** (bits - 1) - 1
    largest = weight.abs().flatten(1).amax(dim=1)
    scale = where(largest == 0, 1.0, largest / most).to(weight.dtype)
    scale = scale.view(-1, *[1] * (weight.ndim - 1))
    return (weight / scale).round().clamp(-most, most) * scale
