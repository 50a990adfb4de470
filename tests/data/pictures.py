"""Real image files of every kind, made on the spot."""

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
