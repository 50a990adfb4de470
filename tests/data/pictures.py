"""Real image files of every kind, made on the spot."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    """A smooth colourful RGB picture without symmetry, different for every seed."""
    corners = np.random.default_rng(seed).integers(20, 200, (3, 4, 3)).astype(np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def write_tree(root: Path, *, train: int = 6, val: int = 3, suffix: str = ".jpg") -> Path:
    """root/{train,val}/{cat,dog}/N.jpg."""
    seed = 0
    for split, count in (("train", train), ("val", val)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(seed).save(root / split / name / f"{i}{suffix}")
                seed += 1
    return root


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "JPEG")
    return file.getvalue()


def write_shard(path: Path, members: dict[str, bytes], how: int = tarfile.PAX_FORMAT) -> Path:
    """A shard of these members, in this order."""
    with tarfile.open(path, "w", format=how) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(*labels: object, first: int = 0) -> dict[str, bytes]:
    parts = {}
    for n, label in enumerate(labels, first):
        parts |= {f"{n:04d}.jpg": jpeg(n), f"{n:04d}.cls": str(label).encode()}
    return parts
