"""What augmentation costs a core of the host, with --augment_on host and device.

    python tests/data/augment_cost.py DIR [IMAGES]

Of a folder of pictures, such as make_set.py makes, at 224 pixels: processor time of reading,
decoding and augmenting, by the route of JPEGs that training uses. The lists take turns of 8
pictures, so that other load meets all alike. Prints microseconds an image: the median of 5 rounds,
the least and the most. Operations on a device are not in them, their draws are.
"""

import sys
from statistics import median
from time import thread_time

import numpy as np
import torch

from dist_looksam.data import decode, load, on_device

CHUNK, ROUNDS, SIDE = 8, 5, 224
MORE = ["jitter", "3augment", "3augment,jitter", "randaugment", "trivialaugment"]
LISTS = [("crop", "host"), ("crop,flip", "host")]
LISTS += [(f"crop,flip,{more}", on) for more in MORE for on in ("host", "device")]


def main(folder: str, images: int) -> None:
    torch.set_num_threads(1)
    sources = {
        (augment, on): load("folder", folder, image_size=SIDE, augment=augment, augment_on=on).train
        for augment, on in LISTS
    }
    rounds = [{name: [0.0, 0.0] for name in LISTS} for _ in range(ROUNDS)]
    out = np.empty((CHUNK, SIDE, SIDE, 3), np.uint8)
    for number, spent in enumerate(rounds):
        keys = torch.arange(images) + number * images
        changes = {}
        for name, source in sources.items():
            began = thread_time()
            changes[name] = source.changes(keys, True)
            if source.augment.on_device:
                on_device.draw(source.augment, 0, keys, height=SIDE, width=SIDE)
            spent[name][0] = thread_time() - began
        for start in range(0, images, CHUNK):
            part = slice(start, start + CHUNK)
            for name in LISTS if start // CHUNK % 2 else LISTS[::-1]:
                indices = keys[part] % len(sources[name])
                began = thread_time()
                sources[name].fetch(
                    indices, keys[part], True, changes=changes[name][part], out=out[: len(indices)]
                )
                spent[name][1] += thread_time() - began
    print(decode.route()[1])
    for name in LISTS:
        each = [1e6 * sum(spent[name]) / images for spent in rounds]
        drawn = 1e6 * median(spent[name][0] for spent in rounds) / images
        print(f"{name[0]:<28} {name[1]:<7} {median(each):6,.0f} ({min(each):,.0f}-{max(each):,.0f})"
              f" us, {drawn:.0f} of them for draws")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 256)
