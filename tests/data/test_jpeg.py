"""The C route of JPEGs against the Python route and against a whole decoded picture."""

import ctypes
from io import BytesIO
from math import ceil
from pathlib import Path

import jpegs
import numpy as np
import pytest
import torch
from PIL import Image

from dist_looksam.data import decode, jpeg, load
from dist_looksam.data.fingerprint import fingerprint
from dist_looksam.run.train import main

pytestmark = pytest.mark.needs("simplejpeg", "jpeg_in_c")


@pytest.fixture
def python(monkeypatch):
    """Switches to the Python route when it is called."""

    def switch() -> None:
        monkeypatch.setenv(jpeg.SWITCH, "python")
        decode.route.cache_clear()

    decode.route.cache_clear()
    yield switch
    monkeypatch.undo()
    decode.route.cache_clear()


def in_c(data: bytes, box: decode.Box, side: int, mirror: bool = False) -> np.ndarray | None:
    out = np.empty((side, side, 3), np.uint8)
    compiled = decode.route()[0]
    assert compiled is not None, decode.route()[1]
    return out if decode._in_c(compiled, out, data, lambda *_: box, mirror) else None


def in_python(data: bytes, box: decode.Box, side: int, mirror: bool = False) -> np.ndarray:
    pixels = np.asarray(decode.square(data, lambda *_: box, side))
    return pixels[:, ::-1] if mirror else pixels


def as_before(data: bytes, box: decode.Box, side: int) -> np.ndarray:
    """The whole picture decoded, then resized in one call, as it was without a C route."""
    left, top, right, bottom = box
    width, height = Image.open(BytesIO(data)).size
    least = {"min_width": ceil(width * side / (right - left)), "min_factor": 2}
    least["min_height"] = ceil(height * side / (bottom - top))
    image = Image.fromarray(decode.simplejpeg.decode_jpeg(data, **least))
    x, y = image.width / width, image.height / height
    scaled = left * x, top * y, min(right * x, image.width), min(bottom * y, image.height)
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=scaled))


def test_500_pictures_have_the_same_pixels_in_c_to_the_bit_and_as_before_within_one_level():
    scales = set()
    for seed in range(500):
        random = np.random.default_rng(seed)
        data = jpegs.jpeg(random)
        size = Image.open(BytesIO(data)).size
        box = jpegs.region(random, *size)
        side, mirror = int(random.choice([16, 31, 64, 224])), bool(random.integers(2))
        scales.add(decode._eighths(size, decode._least(size, box, side)))
        got = in_c(data, box, side, mirror)
        assert got is not None, seed
        assert np.array_equal(got, in_python(data, box, side, mirror)), seed
        before = as_before(data, box, side)
        difference = got.astype(int) - (before[:, ::-1] if mirror else before)
        assert np.abs(difference).max() <= 1, seed
    assert scales == {1, 2, 3, 4, 8}


def end(data: bytes, box: decode.Box | None = None) -> np.ndarray | str:
    """The pixels, or the name of the error."""
    out = np.empty((40, 40, 3), np.uint8)
    try:
        decode.square_into(out, data, lambda w, h: box or (w / 4, h / 4, w * 3 / 4, h / 2))
    except Exception as error:
        return type(error).__name__
    return out


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_and_unusual_files_end_alike_on_both_routes(python):
    files = {
        f"{kind}, {seed}": data
        for seed in range(8)
        for kind, data in jpegs.damaged(np.random.default_rng(seed)).items()
        if kind != "huge" or not seed  # decoded at 1/8, it takes a second
    }
    ends = {kind: end(data) for kind, data in files.items()}
    used = {kind for kind in files if in_c(files[kind], (9, 9, 40, 40), 40) is not None}
    python()
    for kind, data in files.items():
        expected = end(data)
        same = np.array_equal(ends[kind], expected)
        assert type(ends[kind]) is type(expected) and same, kind
    for kind in ("progressive", "CMYK", "turned 6", "12 bits", "truncated to 70 %", "no JPEG"):
        assert not any(name.startswith(kind) for name in used), kind
    for kind in ("truncated to 70 %", "without its last two bytes", "no JPEG", "12 bits"):
        assert isinstance(ends[f"{kind}, 0"], str), kind
    for kind in ("whole", "progressive", "CMYK", "1x1", "grey", "turned 6", "bytes behind the end"):
        assert isinstance(ends[f"{kind}, 0"], np.ndarray), kind
    assert {"whole, 0", "grey, 0", "turned 1, 0"} <= used


def test_damage_below_the_region_ends_alike_also_where_the_picture_is_reduced(python):
    """The C route does not decode what is below the region, and does not meet the damage there. The
    Python route met it and let PIL decode the picture, at another scale."""
    random = np.random.default_rng(1)
    plain = jpegs.encode(Image.fromarray(jpegs.levels(random, 400, 400)), quality=95)
    cut = len(plain) * 3 // 4
    files = [plain[:cut] + jpegs.flipped(random, plain, 400)[cut:] for _ in range(20)]
    top = (30, 0, 330, 120)  # of 40 x 40 pixels: decoded at 3/8
    met = [in_c(data, top, 40) is not None for data in files]
    assert any(met)
    ends = [end(data, top) for data in files]
    python()
    for before, data in zip(ends, files, strict=True):
        assert np.array_equal(before, end(data, top))


@pytest.mark.parametrize("augment", ["crop,flip,randaugment", "src,flip"])
def test_a_folder_has_the_same_training_images_on_both_routes(tree: Path, python, augment: str):
    """Drawn for one sample or for all."""
    source = load("folder", tree, image_size=32, augment=augment).train
    indices, keys = torch.arange(12), torch.arange(12) + 50
    images, labels = source.fetch(indices, keys, True)
    one = torch.cat([source.fetch(indices[i : i + 1], keys[i : i + 1], True)[0] for i in range(12)])
    python()
    again, _ = source.fetch(indices, keys, True)
    assert torch.equal(images, again) and torch.equal(images, one)
    assert labels.tolist() == [0] * 6 + [1] * 6


def test_memory_with_gaps_is_refused_and_not_written_over(tree: Path):
    source = load("folder", tree, image_size=32, augment="none").train
    rows, columns = (np.zeros(shape, np.uint8) for shape in ((8, 32, 32, 3), (4, 32, 64, 3)))
    for out in (rows[::2], columns[:, :, :32]):
        with pytest.raises(TypeError, match="contiguous"):
            source.fetch(torch.arange(4), torch.arange(4), True, out=out)
        assert not out.base.any()


def test_a_libjpeg_with_other_pixels_is_not_used(monkeypatch, python):
    real = jpeg.square

    def other(library: ctypes.CDLL, data: bytes, region, side: int, mirror: bool, out: int) -> bool:
        done = real(library, data, region, side, mirror, out)
        ctypes.cast(out, ctypes.POINTER(ctypes.c_ubyte))[0] ^= 1
        return done

    monkeypatch.setattr(jpeg, "square", other)
    compiled, sentence = decode.route()
    assert compiled is None and "other pixels" in sentence


def test_the_log_says_once_how_jpegs_are_decoded_and_a_resume_says_what_changed(
    tree: Path, tmp_path: Path, python, monkeypatch
):
    out = tmp_path / "run"
    flags = ["--data", "folder", "--data_dir", str(tree), "--image_size", "28", "--out", str(out),
             "--model", "vit_28_mini", "--batch_size", "4", "--device", "cpu",
             "--save_every", "1"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(decode, "simplejpeg", None)
        patch.setenv(jpeg.SWITCH, "python")
        assert main([*flags, "--steps", "1"]) == 0
    log = (out / "log.txt").read_text()
    assert log.count("JPEG files are decoded by PIL") == 1 and f"{jpeg.SWITCH}=python" in log
    decode.route.cache_clear()
    fingerprint.cache_clear()
    assert main([*flags, "--steps", "2", "--resume", "auto"]) == 0
    log = (out / "log.txt").read_text()
    assert log.count("JPEG files are decoded in C, with the pixels of simplejpeg") == 1
    assert "library that decodes JPEG files is simplejpeg, was PIL" in log


def test_a_baseline_copy_is_never_written_beyond_its_room():
    """libjpeg writes a byte before it looks for room: with none it wrote on without an end."""
    compiled, data = jpeg.built(), jpegs.jpeg(np.random.default_rng(0), progressive=True)
    size = len(jpeg.baseline(compiled, data))
    for room in (0, 1, 2, size // 2, size - 1, size + 1):
        out = ctypes.create_string_buffer(b"\xa5" * (2 * size), 2 * size)
        made = compiled.looksam_baseline(data, len(data), out, room)
        assert made == size if room > size else made < 0
        assert out.raw[room:] == b"\xa5" * (2 * size - room)
