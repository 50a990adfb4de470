"""Random numbers without state: a hash of the seed, the sample's global number and the purpose.

So a sample's crop, mixing and drop-path are the same on any number of ranks, workers and
micro-batches, in both passes of a look, and after a resume.
"""

from torch import Tensor

# Purposes. Each has the 64 stream numbers from here on, NOISE all above it; one draw uses one
# stream number. The model has those from 1000 on, for drop-path: models/vit.py.
CROP = 0
FLIP = 64
RANDAUGMENT = 128
MIX = 192
TRIVIAL = 256
THREE = 320
JITTER = 384
ERASE = 448
NOISE = 2**32

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def uniform(seed: int, keys: Tensor, stream: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, of the shape of `keys` broadcast with `stream`.

    keys    int64 [n], any device: the samples' global numbers.
    stream  stream number of the purpose: an int, or int64 on the device of `keys`; `keys[:, None]`
            and a stream [s] give [n, s].

    Two rounds of SplitMix64's finaliser (Steele, Lea, Flood 2014), first over the key, then over
    the stream. Only int64 multiplication (wraps around), addition, xor and shifts: the same bits on
    CPU and CUDA, and no state.
    """
    start = _mix_int((seed + 1) * _GOLDEN)
    mixed = _mix(keys * _signed(_GOLDEN) + _signed(start))
    if isinstance(stream, Tensor):
        offset: int | Tensor = stream * _signed(_SECOND)
    else:
        offset = _signed(stream * _SECOND % 2**64)
    mixed = _mix(mixed + offset)
    return _shift_right(mixed, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit numbers in which every bit moves every bit."""
    x = (x ^ _shift_right(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift_right(x, 27)) * _signed(_SECOND)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's >> on int64 copies the sign bit in from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(x: int) -> int:
    x %= 2**64
    x = ((x ^ (x >> 30)) * _FIRST) % 2**64
    x = ((x ^ (x >> 27)) * _SECOND) % 2**64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
