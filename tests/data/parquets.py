"""Parquet files as Hugging Face's datasets writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(
    path: Path,
    pictures: Sequence[bytes | None],
    labels: Sequence[Any],
    *,
    names: Sequence[str] = (),
    group: int = 4,
    image: str = "image",
    label: str = "label",
    **more: Sequence[Any],
) -> Path:
    """One file in row groups of `group` rows; a picture of None has a path alone."""
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(pictures)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(rows, kind), label: pa.array(labels), **more})
    feature = {"names": list(names), "_type": "ClassLabel"}
    about = {"info": {"features": {image: {"_type": "Image"}, label: feature if names else {}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    parquet.write_table(table, path, row_group_size=group)
    return path


def of_folder(root: Path, target: Path, *, files: int = 2, group: int = 4) -> Path:
    """The pictures of an image tree in its order: target/data/train-00000-of-00002.parquet, ..."""
    names = sorted(path.name for path in (root / "train").iterdir())
    for split, kind in (("train", "train"), ("val", "validation")):
        paths = sorted((root / split).glob("*/*"))
        size = -(-len(paths) // files)
        for n in range(files):
            part = paths[n * size : (n + 1) * size]
            write(
                target / "data" / f"{kind}-{n:05d}-of-{files:05d}.parquet",
                [path.read_bytes() for path in part],
                [names.index(path.parent.name) for path in part],
                names=names,
                group=group,
            )
    return target
