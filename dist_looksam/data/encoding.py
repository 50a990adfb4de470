"""The bytes of a picture that `pack` writes: as they are, reduced, or a baseline JPEG."""

import io
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from . import jpeg
from .decode import progressive, rgb

# What became of a progressive JPEG.
LOSSLESS, AGAIN, LEFT = "without loss", "encoded again", "left"
_QUALITY = 90
_KEPT = ("exif", "icc_profile")  # metadata of a picture that is encoded again
_MAGIC = {b"\xff\xd8": "jpg", b"\x89P": "png", b"GI": "gif", b"BM": "bmp"}


class Encoded(NamedTuple):
    """kind: a file name's ending. progressive: one of the words above; None: it was none."""

    data: bytes
    kind: str
    progressive: str | None = None


def encoded(data: bytes, max_side: int | None) -> Encoded:
    """A picture whose shorter side is `max_side` at most; a progressive JPEG becomes baseline,
    which is decoded twice as fast. Bytes that cannot be decoded stay as they are."""
    if max_side is not None:
        with suppress(Exception):  # decoders raise nearly anything for a damaged file
            data = _reduced(data, max_side)
    if not progressive(data):
        return Encoded(data, _kind(data))
    try:
        return Encoded(*_baseline(data))
    except Exception:
        return Encoded(data, "jpg", LEFT)


def _baseline(data: bytes) -> tuple[bytes, str, str]:
    """By libjpeg with the same coefficients, where the C extension is built; else encoded again,
    with the same quantisation tables."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(rgb(image))
        library = jpeg.built() if jpeg.allowed() else None
        copy = jpeg.baseline(library, data) if library is not None else None
        if copy is not None:
            with Image.open(io.BytesIO(copy)) as other:
                if np.array_equal(np.asarray(rgb(other)), pixels):  # all scans were there
                    return copy, "jpg", LOSSLESS
        file, kept = io.BytesIO(), {k: image.info[k] for k in _KEPT if k in image.info}
        image.save(file, "JPEG", quality="keep", optimize=True, **kept)
    return file.getvalue(), "jpg", AGAIN


def _reduced(data: bytes, max_side: int) -> bytes:
    """The picture with a shorter side of `max_side` at most, as a baseline JPEG; upright, without
    its metadata. Smaller ones are returned as they are."""
    with Image.open(io.BytesIO(data)) as image:
        if min(image.size) <= max_side:
            return data
        picture = ImageOps.exif_transpose(image)
        scale = max_side / min(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = rgb(picture).resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _kind(data: bytes) -> str:
    """The file name's ending, by content: a PNG may be called .jpg."""
    if data[:4] == b"RIFF":
        return "webp"
    if data[:2] in _MAGIC:
        return _MAGIC[data[:2]]
    try:
        with Image.open(io.BytesIO(data)) as image:
            return {"tiff": "tif", "ppm": "ppm"}.get(str(image.format).lower(), "png")
    except Exception:  # damaged: any ending will do
        return "jpg"
