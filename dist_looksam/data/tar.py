"""Samples in tar shards, read at random by an index: see shards.py."""

import os
import resource
import weakref
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .index import Index, read_index
from .pictures import Pictures
from .shards import shards_of

_OTHER_FILES = 256  # that the process may have open besides the shards


class Tar(Pictures):
    """One split in shards. A picture is one `pread` of a shard that stays open."""

    def __init__(self, index: Index, **how: Any) -> None:
        labels = torch.from_numpy(index.rows["label"].astype("int64"))
        super().__init__(index.class_names, labels, passed_over=index.others, **how)
        self.index = index
        _allow_open(len(index.shards))
        self._files = [os.open(path, os.O_RDONLY) for path in index.shards]
        weakref.finalize(self, _close, self._files)

    def path(self, index: int) -> str:
        row = self.index.rows[index]
        return f"{self.index.shards[row['shard']]} at byte {row['offset']}"

    def encoded(self, index: int) -> bytes:
        row = self.index.rows[index]
        size = int(row["size"])
        data = os.pread(self._files[row["shard"]], size, int(row["offset"]))
        if len(data) < size:
            raise OSError("the shard has become shorter")
        return data

    def digest(self) -> str:
        """See source.Source.digest: the hash of the index."""
        return self.index.digest


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _allow_open(shards: int) -> None:
    """Raise this process's limit of open files. ConfigError if it may not be high enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    needed = opened + shards + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ConfigError(
                f"{shards} shards need {needed} open files, got a limit of {hard}; raise it "
                f"(ulimit -Hn), or pack into fewer, larger shards."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def tar(data_dir: str | Path, **how: Any) -> tuple[Tar, Tar]:
    """Training and test split. ConfigError as of `shards_of` and `read_index`."""
    found = shards_of(data_dir)
    train, val = (read_index(data_dir, split, shards) for split, shards in found.items())
    if train.class_names != val.class_names:
        raise ConfigError(
            f"train and val must have been indexed together, got other classes in {data_dir}; "
            f"index again: dist-looksam data index '{data_dir}'."
        )
    return Tar(train, **how), Tar(val, **how)
