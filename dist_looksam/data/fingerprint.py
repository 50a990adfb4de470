"""A fingerprint of a data set, which differs between data sets and for incomplete copies."""

import hashlib
from functools import lru_cache
from typing import Any

from . import Data


@lru_cache(maxsize=1)
def fingerprint(data: Data) -> dict[str, Any]:
    """Descriptions and values, JSON, equal wherever the same data are opened with equal settings.

    From the names of image files and the sizes of about 1,000 per split; else from all pixels.
    """
    classes = hashlib.sha256(repr(data.train.class_names).encode()).hexdigest()
    decoder = data.train.decoder
    return {
        **({"library that decodes JPEG files": decoder} if decoder else {}),
        "number of training images": len(data.train),
        "number of test images": len(data.test),
        "number of classes": data.num_classes,
        "names of the classes (their hash)": classes[:12],
        "names and sizes of the training images (their hash)": data.train.digest()[:12],
        "names and sizes of the test images (their hash)": data.test.digest()[:12],
    }
