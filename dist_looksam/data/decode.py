"""Decodes a region of an image file to a square image."""

from collections.abc import Callable
from io import BytesIO
from math import ceil

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # PIL decodes JPEGs too: a third slower, the same within a few levels
    simplejpeg = None

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the whole picture
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


def square(data: bytes, choose: Callable[[int, int], Box], side: int) -> Image.Image:
    """The region `choose(width, height)` of an encoded picture as RGB of side x side pixels.

    Turns pictures upright as their EXIF says, before `choose` sees their size. A JPEG is decoded at
    a half, quarter or eighth where that is still no smaller than `side`. Grey, palette, CMYK and
    16-bit pictures become RGB, transparency is dropped; of several frames the first is read. Raises
    what the decoder raises if the bytes are damaged, as in a truncated file, or of another depth.
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
        box, least = _plan(image.width, image.height, turn, choose, side)
        whole = image.size
        image.draft(None, least)
        return _cut(rgb(image), whole, turn, box, side)


def _fast_jpeg(data: bytes, choose: Callable[[int, int], Box], side: int) -> Image.Image | None:
    """As `square`; None for the colour spaces that only PIL converts well."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours not in ("YCbCr", "Gray", "RGB"):
        return None
    turn = None
    if b"Exif\0\0" in data[:65536]:
        with Image.open(BytesIO(data)) as image:
            turn = _turn(image)
    box, (least_width, least_height) = _plan(width, height, turn, choose, side)
    pixels = simplejpeg.decode_jpeg(
        data, min_width=least_width, min_height=least_height, min_factor=2
    )
    return _cut(Image.fromarray(pixels), (width, height), turn, box, side)


def _turn(image: Image.Image) -> Image.Transpose | None:
    return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))


def _swaps(turn: Image.Transpose | None) -> bool:
    return turn in (_UPRIGHT[5], _UPRIGHT[6], _UPRIGHT[7], _UPRIGHT[8])


def _plan(
    width: int,
    height: int,
    turn: Image.Transpose | None,
    choose: Callable[[int, int], Box],
    side: int,
) -> tuple[Box, tuple[int, int]]:
    """The region of the upright picture, and the minimum size to decode the stored one at."""
    if _swaps(turn):
        width, height = height, width
    box = choose(width, height)
    left, top, right, bottom = box
    least = ceil(width * side / (right - left)), ceil(height * side / (bottom - top))
    return box, (least[::-1] if _swaps(turn) else least)


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
    image: Image.Image,
    whole: tuple[int, int],
    turn: Image.Transpose | None,
    box: Box,
    side: int,
) -> Image.Image:
    """Turns a decoded picture upright and resizes `box`, which is in pixels of the whole size."""
    if turn is not None:
        image = image.transpose(turn)
    width, height = whole[::-1] if _swaps(turn) else whole
    x, y = image.width / width, image.height / height
    left, top, right, bottom = box
    scaled = (
        left * x,
        top * y,
        min(right * x, float(image.width)),
        min(bottom * y, float(image.height)),
    )
    return image.resize((side, side), Image.Resampling.BILINEAR, box=scaled)
