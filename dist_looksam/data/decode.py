"""Decodes a region of an image file to a square image."""

import ctypes
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from io import BytesIO
from itertools import product
from math import ceil, floor
from threading import local
from typing import Any

import numpy as np
from PIL import Image

from . import jpeg

try:
    import simplejpeg
except ImportError:  # PIL decodes JPEGs too: slower, and not at 3/8
    simplejpeg = None

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the whole picture
Choose = Callable[[int, int], Box]  # from the width and height of the upright picture
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MOST_KEPT = 2**24  # bytes of a decoded picture whose memory a thread keeps for the next one
_KEPT = local()
_PROBE = (9.0, 7.0, 83.0, 71.0)  # region of the pictures that `route` compares
_MARK = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # what ends the coded pixels of a JPEG


def library() -> str:
    """The library whose pixels JPEGs have. The C route has the same pixels to the bit."""
    return "PIL" if simplejpeg is None else "simplejpeg"


def square_into(
    out: np.ndarray,
    data: bytes,
    choose: Choose,
    *,
    mirror: bool = False,
    in_c: bool = True,
    at: int | None = None,
) -> None:
    """Writes what `square` returns to `out`, uint8 [side, side, 3] without gaps; `mirror`: left and
    right exchanged. Baseline JPEGs by the C route where it is built. at: the address of `out`,
    where it is known."""
    compiled = route()[0] if in_c else None
    if compiled is None or not _in_c(compiled, out, data, choose, mirror, at):
        picture = square(data, choose, len(out))
        if mirror:  # NumPy would take 250 us for it
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out[:] = np.asarray(picture)


def address(out: np.ndarray) -> int:
    """Of memory to write to, 0 if it holds nothing. Raises BufferError or TypeError where it has
    gaps or is read-only."""
    if not out.size:
        return 0
    return ctypes.addressof(ctypes.c_char.from_buffer(out.data))  # out.ctypes.data takes 6 us


def _in_c(
    compiled: ctypes.CDLL,
    out: np.ndarray,
    data: bytes,
    choose: Choose,
    mirror: bool,
    at: int | None = None,
) -> bool:
    """As `square_into`; False, and `out` is undefined, if the C route does not do this picture."""
    size, side = jpeg.size(compiled, data), len(out)
    if size is None:
        return False
    box = choose(*size)
    eighths = _eighths(size, _least(size, box, side))
    decoded = -(-size[0] * eighths // 8), -(-size[1] * eighths // 8)
    region = jpeg.Region(eighths, *_region(box, size, decoded, side))
    at = address(out) if at is None else at
    return jpeg.square(compiled, data, region, side, mirror, at)


def square(data: bytes, choose: Choose, side: int) -> Image.Image:
    """The region `choose(width, height)` of an encoded picture as RGB of side x side pixels.

    Turns pictures upright as their EXIF says, before `choose` sees their size. A JPEG is decoded at
    1/8, 2/8, 3/8 (not by PIL) or 4/8 where that is still no smaller than `side`. Grey, palette,
    CMYK and 16-bit pictures become RGB, transparency is dropped; of several frames the first is
    read. Raises what the decoder raises if the bytes are damaged, as in a truncated file, or of
    another depth. This is the Python route.
    """
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            picture = _fast_jpeg(data, choose, side)
        except ValueError:  # also for files that PIL can repair
            picture = None
        if picture is not None:
            return picture
    with Image.open(BytesIO(data)) as image:
        turn = _turn(image)
        size = _turned(image.size, turn)
        box = choose(*size)
        image.draft(None, _turned(_least(size, box, side), turn))
        return _cut(rgb(image), turn, box, size, side)


def _fast_jpeg(data: bytes, choose: Choose, side: int) -> Image.Image | None:
    """As `square`; None for the colour spaces that only PIL converts well."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours not in ("YCbCr", "Gray", "RGB"):
        return None
    turn, scan = None, 0
    for kind, scan in _segments(data):
        if kind == 0xE1 and data[scan : scan + 6] == b"Exif\0\0":
            with Image.open(BytesIO(data)) as image:
                turn = _turn(image)
    size = _turned((width, height), turn)
    box = choose(*size)
    least = _turned(_least(size, box, side), turn)
    how: dict[str, Any] = {"min_width": least[0], "min_height": least[1], "min_factor": 2}
    if width * height * 3 <= _MOST_KEPT:
        how["buffer"] = _buffer(width * height * 3)
    try:
        pixels = simplejpeg.decode_jpeg(data, **how)
    except ValueError:
        # Damage within the only scan leaves pixels; the C route may not even see it.
        end = _MARK.search(data, scan)
        if end is None or end[0] != b"\xff\xd9":
            raise
        pixels = simplejpeg.decode_jpeg(data, **how, strict=False)
    if turn is not None:
        return _cut(Image.fromarray(pixels), turn, box, size, side)
    (left, top, right, bottom), inside = _region(box, size, pixels.shape[1::-1], side)
    return _resized(Image.fromarray(pixels[top:bottom, left:right]), inside, side)


def _buffer(size: int) -> np.ndarray:
    """This thread's memory for a decoded picture; new memory costs a page fault every 4 KB."""
    kept = getattr(_KEPT, "buffer", None)
    if kept is None or len(kept) < size:
        kept = _KEPT.buffer = np.empty(size, np.uint8)
    return kept


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(kind, first byte) of the segments before the coded pixels; last, (0xDA, their first)."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if kind == 0xDA:
            yield kind, at + 2 + length
            return
        yield kind, at + 4
        at += 2 + length


def progressive(data: bytes) -> bool:
    """Whether this is a progressive JPEG, by its header."""
    return data[:2] == b"\xff\xd8" and any(kind == 0xC2 for kind, _ in _segments(data))


@lru_cache(maxsize=1)
def route() -> tuple[ctypes.CDLL | None, str]:
    """The compiled library if it is to be used, and a sentence for the log.

    It is used only if it gives the pixels of the Python route, of small pictures that this makes.
    """
    python = f"JPEG files are decoded by {library()}, with the same pixels as in C but slower"
    if not jpeg.allowed():
        return None, f"{python}: {jpeg.SWITCH}=python"
    if (compiled := jpeg.built()) is None:
        return None, f"{python}: the C extension of the package is not built, see docs/data.md"
    for data, side in product(_samples(), (32, 64)):  # at a half, and whole
        out = np.empty((side, side, 3), np.uint8)
        done = _in_c(compiled, out, data, lambda *_: _PROBE, False)
        if not done or not np.array_equal(out, np.asarray(square(data, lambda *_: _PROBE, side))):
            return None, f"{python}: the libjpeg of this machine gives other pixels"
    return compiled, f"JPEG files are decoded in C, with the pixels of {library()}"


def _samples() -> Iterator[bytes]:
    """Small noisy JPEGs, 96 x 80: 4:4:4, 4:2:2, 4:2:0 and grey."""
    levels = np.random.Generator(np.random.Philox(0)).integers(0, 256, (80, 96, 3)).astype(np.uint8)
    for image, sampling in [(levels, 0), (levels, 1), (levels, 2), (levels[..., 0], 0)]:
        file = BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=90, subsampling=sampling)
        yield file.getvalue()


def _turn(image: Image.Image) -> Image.Transpose | None:
    return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))


def _turned(size: tuple[int, int], turn: Image.Transpose | None) -> tuple[int, int]:
    """Width and height after `turn`; also those before it."""
    swaps = turn in (_UPRIGHT[5], _UPRIGHT[6], _UPRIGHT[7], _UPRIGHT[8])
    return size[::-1] if swaps else size


def _least(size: tuple[int, int], box: Box, side: int) -> tuple[int, int]:
    """The minimum size of the decoded picture, so that `box` has `side` pixels or more."""
    left, top, right, bottom = box
    return ceil(size[0] * side / (right - left)), ceil(size[1] * side / (bottom - top))


def _eighths(size: tuple[int, int], least: tuple[int, int]) -> int:
    """The scale at which the Python route decodes a JPEG, in eighths."""
    (width, height), (w, h) = size, least
    for m in (1, 2, 3, 4):
        if simplejpeg is None:  # as Image.draft
            if m != 3 and min(width // w, height // h) * m >= 8:
                return m
        elif -(-width * m // 8) >= w and -(-height * m // 8) >= h:
            return m
    return 8


def _region(
    box: Box, size: tuple[int, int], decoded: tuple[int, int], side: int
) -> tuple[tuple[int, int, int, int], Box]:
    """The window of a decoded picture that `box`, in pixels of `size`, is resized from, with what
    the filter reads around it; and the box within the window."""
    x0, x1, left, right = _reach(box[0], box[2], size[0], decoded[0], side)
    y0, y1, top, bottom = _reach(box[1], box[3], size[1], decoded[1], side)
    return (x0, y0, x1, y1), (left, top, right, bottom)


def _reach(
    low: float, high: float, whole: int, decoded: int, side: int
) -> tuple[int, int, float, float]:
    """Of one direction: first pixel of the window and the one behind its last; the ends of the box
    within it. Each image passes here, so that max() and min() would cost 3 us of Python's lock."""
    scale = decoded / whole
    low, high = low * scale, high * scale
    if high > decoded:
        high = float(decoded)
    margin = (high - low) / side
    margin = margin + 1 if margin > 1.0 else 2.0
    first, last = floor(low - margin), ceil(high + margin)
    if first < 0:
        first = 0
    return first, last if last < decoded else decoded, low - first, high - first


def _resized(window: Image.Image, box: Box, side: int) -> Image.Image:
    """First each row, then each column, because Pillow 13 and later choose the order by the sizes.

    So the pixels do not depend on the release of Pillow, and those of the C route can be equal.
    """
    left, top, right, bottom = box
    height = window.height
    rows = window.resize((side, height), Image.Resampling.BILINEAR, box=(left, 0, right, height))
    return rows.resize((side, side), Image.Resampling.BILINEAR, box=(0, top, side, bottom))


def rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it to white
        levels = np.asarray(image).astype(np.int64)
        if not 0 <= levels.min() <= levels.max() < 65536:
            raise ValueError(f"grey levels must be of 8 or 16 bits, got up to {levels.max()}")
        if levels.max() > 255:
            levels >>= 8
        image = Image.fromarray(levels.astype(np.uint8))
    if image.mode == "F":  # convert() would make black of 0 to 1
        raise ValueError("pixels must be whole numbers, got 32-bit floats")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _cut(
    image: Image.Image, turn: Image.Transpose | None, box: Box, size: tuple[int, int], side: int
) -> Image.Image:
    """Turns a decoded picture upright and resizes `box`, in pixels of the upright `size`."""
    if turn is not None:
        image = image.transpose(turn)
    window, inside = _region(box, size, image.size, side)
    return _resized(image.crop(window), inside, side)
