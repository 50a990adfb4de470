"""The C route of JPEGs: jpeg.c, an optional part of the package, called by ctypes.

A call does not hold Python's lock (the GIL). DIST_LOOKSAM_JPEG=python turns the route off. It gives
the pixels of the Python route to the bit, so that a run may go on where it is not built.
"""

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

SWITCH = "DIST_LOOKSAM_JPEG"
_HERE = Path(__file__).parent


class Region(NamedTuple):
    """What to cut from a picture that is decoded at eighths/8 of its size.

    window  left, top, right, bottom: whole pixels of the decoded picture
    box     left, top, right, bottom within the window: what is resized to a square
    """

    eighths: int
    window: tuple[int, int, int, int]
    box: tuple[float, float, float, float]


@lru_cache(maxsize=1)
def built() -> ctypes.CDLL | None:
    """The compiled library; None where it was not built or cannot be loaded."""
    for path in _HERE.glob("_jpeg*.so"):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # libjpeg is not on this machine
            continue
        number, real = ctypes.c_int, ctypes.c_float
        library.looksam_size.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        library.looksam_size.restype = ctypes.c_int64
        library.looksam_square.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        library.looksam_square.argtypes += [*5 * [number], *4 * [real], number, number]
        library.looksam_square.argtypes += [ctypes.c_void_p]
        return library
    return None


def allowed() -> bool:
    return os.environ.get(SWITCH) != "python"


def size(library: ctypes.CDLL, data: bytes) -> tuple[int, int] | None:
    """Width and height of a picture that `square` may decode, else None."""
    both = library.looksam_size(data, len(data))
    return None if both < 0 else (both >> 16, both & 0xFFFF)


def square(
    library: ctypes.CDLL, data: bytes, region: Region, side: int, mirror: bool, out: int
) -> bool:
    """Writes side x side RGB pixels to the address `out`, left and right exchanged if `mirror`.

    False if the picture must be decoded by the Python route; `out` is then undefined.
    """
    return not library.looksam_square(
        data, len(data), region.eighths, *region.window, *region.box, side, mirror, out
    )


def baseline(library: ctypes.CDLL, data: bytes) -> bytes | None:
    """A progressive JPEG as a baseline one with the same coefficients; None if it cannot be made,
    as of a damaged one."""
    if not hasattr(library, "looksam_baseline"):  # built from an older jpeg.c
        return None
    library.looksam_baseline.argtypes = [ctypes.c_char_p, ctypes.c_size_t] * 2
    library.looksam_baseline.restype = ctypes.c_int64
    out = ctypes.create_string_buffer(2 * len(data) + 2**16)
    size = library.looksam_baseline(data, len(data), out, len(out))
    return out.raw[:size] if size >= 0 else None
