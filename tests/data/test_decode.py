from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pictures import picture
from PIL import Image, ImageOps

from dist_looksam.data import decode
from dist_looksam.data.decode import square


@pytest.fixture(params=["simplejpeg", "PIL"], autouse=True)
def jpeg_decoder(request, needs, monkeypatch):
    if request.param == "PIL":
        monkeypatch.setattr(decode, "simplejpeg", None)
    else:
        needs("simplejpeg")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def whole(width: int, height: int) -> decode.Box:
    return 0, 0, width, height


def error(got: Image.Image, expected: Image.Image) -> float:
    """Mean absolute difference in levels of 255."""
    assert got.mode == "RGB" and got.size == expected.size
    return float(np.abs(np.asarray(got, float) - np.asarray(expected.convert("RGB"), float)).mean())


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"),
     ("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGB"), ("BMP", "RGB")],
)  # fmt: skip
def test_every_kind_of_picture_becomes_the_same_rgb(kind: str, mode: str):
    image = picture(1).convert(mode)
    got = square(encoded(image, kind), whole, 32)
    assert error(got, image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)) < 4


def test_16_bit_grey_is_scaled_and_not_clipped_to_white():
    levels = np.asarray(picture(1).convert("L"))
    got = square(encoded(Image.fromarray(levels.astype(np.uint16) * 256), "PNG"), whole, 32)
    assert error(got, Image.fromarray(levels).resize((32, 32), Image.Resampling.BILINEAR)) < 1


def test_palette_with_transparency_does_not_warn(recwarn):
    image = picture(1).convert("P")
    square(encoded(image, "PNG", transparency=bytes(range(256))), whole, 16)
    assert not list(recwarn)


def oriented(image: Image.Image, orientation: int) -> Image.Exif:
    exif = image.getexif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_are_turned_upright_before_the_region_is_chosen(kind: str, orientation: int):
    lying = picture(2, 400, 300)
    data = encoded(lying, kind, exif=oriented(lying, orientation))
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    sizes = []

    def left_half(width: int, height: int) -> decode.Box:
        sizes.append((width, height))
        return 0, 0, width / 2, height

    got = square(data, left_half, 40)
    half = (0, 0, upright.width / 2, upright.height)
    expected = upright.resize((40, 40), Image.Resampling.BILINEAR, box=half)
    assert sizes == [(400, 300) if orientation < 5 else (300, 400)]
    assert error(got, expected) < 3


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("box", [(60, 90, 400, 410), (60, 90, 160, 410), (60, 90, 400, 190)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_scaled_decoding_gives_the_same_region_never_from_fewer_pixels(
    side: int, box: decode.Box, orientation: int, monkeypatch
):
    lying = picture(3, 640, 480)
    data = encoded(lying, "JPEG", quality=95, exif=oriented(lying, orientation))
    seen = []
    cut = decode._region
    monkeypatch.setattr(
        decode,
        "_region",
        lambda b, size, decoded, s: seen.append(decoded) or cut(b, size, decoded, s),
    )
    got = square(data, lambda *_: box, side)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    expected = upright.resize((side, side), Image.Resampling.BILINEAR, box=box)
    assert error(got, expected) < 2
    scale = max(seen[-1]) / 640
    left, top, right, bottom = box
    shorter = min(right - left, bottom - top)
    assert shorter * scale >= side or scale == 1
    assert (scale < 1) == (shorter / 2 >= side)  # and it is used where it can be


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_truncated_file_raises(kind: str):
    data = encoded(picture(4), kind)
    for keep in (0, 10, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(Exception):  # noqa: B017 - decoders raise what they like
            square(data[:keep], whole, 16)


def test_a_file_is_what_its_bytes_say_not_its_name(tmp_path: Path):
    """ImageNet holds a PNG that is called JPEG."""
    image = picture(5)
    got = square(encoded(image, "PNG"), whole, 16)
    assert error(got, image.resize((16, 16), Image.Resampling.BILINEAR)) == 0
