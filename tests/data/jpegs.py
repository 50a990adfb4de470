"""JPEGs by random numbers: kinds, sizes, regions; and damaged ones."""

from io import BytesIO

import numpy as np
from PIL import Image

Random = np.random.Generator


def levels(random: Random, width: int, height: int) -> np.ndarray:
    """Colourful shapes at many scales with noise, uint8 [height, width, 3]."""
    total = np.zeros((height, width, 3))
    for cells in (2, 9, 40):
        coarse = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(image, float) / 3
    noise = random.normal(0, random.choice([0, 4, 20]), total.shape)
    return (total + noise).clip(0, 255).astype(np.uint8)


def encode(image: Image.Image, **options) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def jpeg(random: Random, *, longest: int = 500, **options) -> bytes:
    """A JPEG of a kind that the C route decodes, sides from 1 to `longest`."""
    width, height = (int(longest ** random.uniform(0.2, 1)) for _ in range(2))
    image = Image.fromarray(levels(random, width, height))
    if random.random() < 0.1:
        image = image.convert("L")
    how = {
        "quality": int(random.integers(60, 97)),
        "subsampling": int(random.integers(3)),
        "restart_marker_blocks": int(random.choice([0, 0, 0, 7])),
    }
    return encode(image, **{**how, **options})


def region(random: Random, width: int, height: int) -> tuple[float, float, float, float]:
    """Any region: whole pixels, or fractions of them, or the whole picture."""
    x, y = np.sort(random.uniform(0, 1, (2, 2)))
    left, right, top, bottom = x[0] * width, x[1] * width, y[0] * height, y[1] * height
    if random.random() < 0.5:
        left, top = int(left), int(top)
        right, bottom = max(left + 1, int(right)), max(top + 1, int(bottom))
    if random.random() < 0.2 or right - left < 0.1 or bottom - top < 0.1:
        return 0, 0, width, height
    return float(left), float(top), float(right), float(bottom)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def patched(data: bytes, mark: int, offset: int, new: bytes) -> bytes:
    """`new` in place of the bytes from `offset` on, behind the first two bytes FF `mark`."""
    at = data.index(bytes([0xFF, mark])) + 2 + offset
    return data[:at] + new + data[at + len(new) :]


def flipped(random: Random, data: bytes, count: int) -> bytes:
    """`count` bytes of the coded pixels changed."""
    scan, changed = data.index(b"\xff\xda") + 14, bytearray(data)
    for at in random.integers(scan, len(data) - 2, count):
        changed[at] = random.integers(0, 256)
    return bytes(changed)


def damaged(random: Random) -> dict[str, bytes]:
    """Files that a decoder must end with, of every kind of damage and of unusual contents."""
    image = Image.fromarray(levels(random, 150, 110))
    plain = encode(image, quality=90, subsampling=2)
    start = plain.index(b"\xff\xc0") + 2
    return {
        "whole": plain,
        **{f"truncated to {n} %": plain[: len(plain) * n // 100] for n in (1, 30, 70, 99)},
        "without its last two bytes": plain[:-2],
        "progressive": encode(image, progressive=True),
        "CMYK": encode(image.convert("CMYK")),
        "huge": patched(plain, 0xC0, 3, b"\x4e\x20\x4e\x20"),
        "wider": patched(plain, 0xC0, 5, b"\x00\xc0"),
        "higher": patched(plain, 0xC0, 3, b"\x01\x00"),
        "1x1": encode(image.resize((1, 1))),
        "1 row": encode(image.resize((150, 1))),
        "grey": encode(image.convert("L")),
        **{f"turned {n}": encode(image, exif=exif(n)) for n in (1, 3, 6, 8)},
        "12 bits": patched(plain, 0xC0, 2, b"\x0c"),
        "16 bits": patched(plain, 0xC0, 2, b"\x10"),
        "no JPEG": b"\xff\xd8" + b"no picture at all" * 50,
        "empty": b"",
        "no height": patched(plain, 0xC0, 3, b"\x00\x00"),
        "no components": patched(plain, 0xC0, 7, b"\x00"),
        "a segment of length 0": plain[:start] + b"\0\0" + plain[start + 2 :],
        "a segment behind the end": plain[:start] + b"\xff\xff" + plain[start + 2 :],
        "no tables": plain.replace(b"\xff\xc4", b"\xff\xfe"),
        "a mark in the pixels": flipped(random, plain, 1)[:-900] + b"\xff\xc4" + plain[-898:],
        **{f"other bytes {n}": flipped(random, plain, n) for n in (1, 2, 3, 5, 40)},
        "bytes behind the end": plain + b"\0" * 99,
        "two pictures": plain + plain,
    }
