"""Makes a set of JPEGs like ImageNet's to measure on, in DIR/train/CLASS and DIR/val/CLASS.

    python tests/data/make_set.py DIR [NUMBER]

Crops at random scale of scikit-learn's two photographs, mirrored, recoloured, with film grain.
Sides: 77 % about 500 x 375, 12 % smaller, 11 % larger; quality 85 to 95, three quarters 4:2:0.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

_USUAL = [(500, 375), (500, 375), (500, 333), (375, 500), (333, 500), (500, 500)]
_SMALLER, _LARGER = [(320, 240), (250, 300), (400, 300)], [(1200, 900), (900, 1200), (1600, 1200)]


def picture(random: np.random.Generator, photographs: list[np.ndarray]) -> Image.Image:
    kind = random.random()
    sizes = _USUAL if kind < 0.77 else _SMALLER if kind < 0.89 else _LARGER
    width, height = sizes[random.integers(len(sizes))]
    photograph = Image.fromarray(photographs[random.integers(len(photographs))])
    most = min(photograph.width / width, photograph.height / height)
    scale = most * random.uniform(0.5, 1)
    left = random.uniform(0, photograph.width - scale * width)
    top = random.uniform(0, photograph.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    image = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
    levels = np.asarray(image, np.float32)[:, :: random.choice([1, -1])]
    levels = levels * random.uniform(0.7, 1.2, 3) + random.uniform(-20, 20, 3)
    grain = random.normal(0, random.uniform(2, 7.5), (height, width, 1))
    return Image.fromarray((levels + grain).clip(0, 255).astype(np.uint8))


def make(root: Path, number: int) -> None:
    photographs = load_sample_images().images
    for i in range(number):
        random = np.random.default_rng(i)
        folder = root / ("train" if i % 10 else "val") / f"class-{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(random, photographs).save(
            folder / f"{i:06d}.jpg",
            quality=int(random.integers(85, 96)),
            subsampling=int(random.choice([2, 2, 2, 0])),
        )


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 600)
