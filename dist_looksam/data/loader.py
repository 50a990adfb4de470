"""Steps of training and of evaluation for one rank, fetched ahead where that helps."""

import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, RunError
from . import erasing, mixing, on_device
from .augment import Augment, check_repeat
from .batch import Batch
from .blocks import FULL, order_of
from .growth import Growth
from .order import places
from .source import UNREADABLE, Source

_CHUNK = 8  # images a thread takes at once
_MAX_WORKERS = 16
_MOST_FAILURES = 100  # unreadable samples in a row, from which on the disk is assumed to be lost


class _Job:
    """One micro-batch being fetched: by threads, or without threads at `result`."""

    def __init__(
        self, fetcher: "_Fetcher", indices: Tensor, keys: Tensor, side: int | None = None
    ) -> None:
        """side: height and width of the images in pixels; None: those of the source."""
        self.fetcher = fetcher
        self.indices, self.keys = indices, keys
        self.futures: list[Future[None]] = []
        if not fetcher.source.parallel:
            return
        channels, height, width = fetcher.source.shape
        height, width = (height, width) if side is None else (side, side)
        # Channels last in memory, as decoders write it; made contiguous on the device.
        shape = (len(keys), height, width, channels)
        if fetcher.pin:  # torch keeps this memory for the next micro-batch
            buffer = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            buffer = fetcher.memory.tensor(shape)
        self.images = buffer.permute(0, 3, 1, 2)
        self.pixels = buffer.numpy()
        self.labels = torch.empty(len(keys), dtype=torch.int64)
        self.changes = fetcher.changes(keys)
        if fetcher.pool is not None:
            for start in range(0, len(keys), _CHUNK):
                self.futures.append(fetcher.pool.submit(self._fill, slice(start, start + _CHUNK)))

    def _fill(self, part: slice) -> None:
        changes, out = self.changes[part], self.pixels[part]
        _, labels = self.fetcher.fetch(
            self.indices[part], self.keys[part], changes=changes, out=out
        )
        # NumPy copies in this thread; torch would start more threads in each.
        np.copyto(self.labels.numpy()[part], labels.numpy())

    def result(self) -> tuple[Tensor, Tensor]:
        """Waits; images uint8 [n, C, H, W] and labels int64 [n]. Raises what a thread raised."""
        if not self.fetcher.source.parallel:
            return self.fetcher.fetch(self.indices, self.keys)
        if self.fetcher.pool is None:
            self._fill(slice(None))
        for future in self.futures:
            future.result()
        return self.images, self.labels

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()


class _Memory:
    """Memory of batches on the host. What a batch had is given to another one when nothing refers
    to it any more: new memory takes 20 to 60 us of page faults an image."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """uint8, undefined."""
        size = int(np.prod(shape))
        whole = self._free.pop() if self._free else None
        if whole is None or len(whole) != size:  # images may grow; the old memory is let go
            whole = np.empty(size, np.uint8)  # in large pages, as NumPy asks for them
        array = whole.reshape(shape)
        # The tensor refers to `array`, and so does every view of the tensor, but `whole` does not.
        weakref.finalize(array, self._free.append, whole).atexit = False
        return torch.from_numpy(array)

    def clear(self) -> None:
        self._free.clear()


class _Fetcher:
    """A source and its pool of threads."""

    def __init__(
        self, source: Source, *, train: bool, workers: int | None, pin: bool | None
    ) -> None:
        self.source: Any = source
        self.train = train
        self.pin = torch.cuda.is_available() if pin is None else pin
        if workers is None:
            workers = min(_MAX_WORKERS, cores())
        threaded = source.parallel and workers > 0
        self.memory = _Memory()
        self._failed = 0  # unreadable samples in a row, in evaluation
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="data") if threaded else None

    def changes(self, keys: Tensor) -> Sequence[Any]:
        """Drawn once for a micro-batch, because a draw takes as long for 8 samples as for 256."""
        return self.source.changes(keys, self.train)

    def fetch(self, indices: Tensor, keys: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        """As Source.fetch; in training the next readable sample replaces an unreadable one.

        RunError if 100 samples in a row are unreadable.
        """
        images, labels = self.source.fetch(indices, keys, self.train, **how)
        bad = labels == UNREADABLE
        if not self.train:
            self._failed = self._failed + len(labels) if bad.all() else 0
        for step in range(1, _MOST_FAILURES):
            if not (self.train and bad.any()):
                break
            instead = (indices[bad] + step) % len(self.source)
            if "out" in how:
                how = {"out": np.empty_like(how["out"][: len(instead)])}
            images[bad], labels[bad] = self.source.fetch(instead, keys[bad], True, **how)
            bad = labels == UNREADABLE
        if (self.train and bad.any()) or self._failed >= _MOST_FAILURES:
            last = list(self.source.unreadable)[-1]
            raise RunError(
                f"{_MOST_FAILURES} image files in a row cannot be read, one of them is {last}; "
                f"check that the disk is still there."
            )
        return images, labels

    def finish(self, job: _Job) -> Batch:
        images, labels = job.result()
        mean, std = self.source.mean, self.source.std
        return Batch(images=images, labels=labels, keys=job.keys, mean=mean, std=std)

    def ahead(self, micro_batch: int, limit: int) -> int:
        """How many micro-batches may be fetched ahead within `limit` bytes; 0 without threads."""
        size = micro_batch * int(np.prod(self.source.shape))
        return limit // size if self.pool is not None else 0

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.memory.clear()


def cores() -> int:
    """Cores that this process may use: job systems may allow fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class TrainLoader:
    """The training batches of one rank, with random access, so that a resumed run needs no replay.

    Step t's global batch is stream positions [t * batch_size, (t + 1) * batch_size). Micro-batch a
    of rank r is the `micro_batch` positions from t * batch_size + (a * ranks + r) * micro_batch, so
    the union over ranks does not depend on their number. With repeated augmentation the batch holds
    batch_size / repeat samples: see order.places.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        batch_size: int,
        micro_batch: int,
        rank: int,
        ranks: int,
        workers: int | None = None,
        prefetch: int = 2,
        prefetch_bytes: int = 512 * 2**20,
        pin: bool | None = None,
        shuffle: str = FULL,
        mixup_until: int | None = None,
        growth: Growth | None = None,
    ) -> None:
        """batch_size is global; micro_batch is per rank and forward.

        workers         threads that fetch, 0 for none, None for one per core up to 16; not used if
                        the source is in memory
        prefetch        number of steps fetched ahead in the background, within prefetch_bytes
        pin             use page-locked memory; None: if there is CUDA
        shuffle         value of --shuffle
        mixup_until     first step whose images are not mixed; None: all are, if the source says so
        growth          sides of the images over the steps; None: that of the source
        ConfigError if the batch does not divide, or holds parts of repetitions or of mixed pairs.
        """
        _check_split(batch_size, micro_batch, ranks)
        check_pairs(source.augment, micro_batch)
        check_repeat(source.augment, batch_size)
        self.source = source
        self.seed = seed
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.rank, self.ranks = rank, ranks
        self.accumulation = batch_size // (micro_batch * ranks)
        self.mixup_until, self.growth = mixup_until, growth
        self._order = order_of(shuffle, len(source), seed)
        self._fetcher = _Fetcher(source, train=True, workers=workers, pin=pin)
        self._ahead = min(
            prefetch * self.accumulation, self._fetcher.ahead(micro_batch, prefetch_bytes)
        )
        self._jobs: dict[int, _Job] = {}

    def step(self, t: int) -> list[Batch]:
        """This rank's micro-batches of step t, on the host; starts to fetch the next steps.

        The list holds the step once as uint8. Drop the last step's list before asking for the next
        one, or both are held.
        """
        first = t * self.accumulation
        wanted = range(first, first + self.accumulation)
        ahead = range(wanted.stop, wanted.stop + self._ahead)
        for number in [n for n in self._jobs if n not in wanted and n not in ahead]:
            self._jobs.pop(number).cancel()
        for number in chain(wanted, ahead):
            if number not in self._jobs:
                self._jobs[number] = self._start(number)
        return [self._finish(number) for number in wanted]

    def _start(self, number: int) -> _Job:
        """Starts to fetch this rank's micro-batch `number`, counted from the start of training."""
        t, a = divmod(number, self.accumulation)
        first = t * self.batch_size + (a * self.ranks + self.rank) * self.micro_batch
        keys = torch.arange(first, first + self.micro_batch)
        repeat = self.source.augment.repeat
        indices, _ = self._order.at(places(keys, batch_size=self.batch_size, repeat=repeat))
        side = None if self.growth is None else self.growth.side(t)
        return _Job(self._fetcher, indices, keys, side)

    def _finish(self, number: int) -> Batch:
        batch = self._fetcher.finish(self._jobs.pop(number))
        augment = self.source.augment
        height, width = batch.images.shape[-2:]
        if augment.on_device:
            done = on_device.draw(augment, self.seed, batch.keys, height=height, width=width)
            batch = replace(batch, **done._asdict(), fill=self.source.fill)
        if augment.erasing:
            erased = erasing.draw(
                augment.erasing, self.seed, batch.keys, height=height, width=width
            )
            batch = replace(batch, erased=erased, seed=self.seed)
        mixes = self.mixup_until is None or number // self.accumulation < self.mixup_until
        if augment.mixes and mixes:
            lam, boxes = mixing.draw(augment, self.seed, batch.keys, height=height, width=width)
            partner = mixing.swap(batch.labels)
            batch = replace(batch, partner=partner, lam=lam, boxes=boxes)
        return batch.pin() if self._fetcher.pin else batch

    @property
    def steps_per_epoch(self) -> float:
        """Number of samples / batch_size; below 1 if the batch is larger than the data.

        With repeated augmentation an epoch is as many steps, with 1 / repeat of the samples.
        """
        return len(self.source) / self.batch_size

    def epoch_of(self, step: int) -> float:
        """Number of epochs trained before step `step`."""
        return step * self.batch_size / len(self.source)

    def close(self) -> None:
        """Ends the threads and drops prefetched micro-batches."""
        self._fetcher.close()
        self._jobs.clear()


def check_pairs(augment: Augment, size: int, name: str = "micro_batch") -> None:
    """ConfigError if samples are mixed in pairs and a micro-batch does not hold whole pairs."""
    if augment.mixes and size % 2:
        raise ConfigError(
            f"{name} must be even when mixup or cutmix is on, got {size}; "
            f"use {size + 1} or leave them out of --augment."
        )


def _check_split(batch_size: int, micro_batch: int, ranks: int) -> None:
    """ConfigError that names the nearest batch sizes if batch_size is not whole micro-batches."""
    unit = micro_batch * ranks
    if batch_size > 0 and batch_size % unit == 0:
        return
    below, above = batch_size // unit * unit, (max(batch_size, 0) // unit + 1) * unit
    nearest = f"{below} or {above}" if below > 0 else f"{above}"
    raise ConfigError(
        f"batch_size must be micro_batch x ranks x a whole number, got {batch_size} with "
        f"micro_batch {micro_batch} and {ranks} ranks; use {nearest}."
    )


class EvalLoader:
    """This rank's part of a test set: every sample is on exactly one rank, once, without padding.

    A sample that cannot be read has the label source.UNREADABLE; do not count it.

    Every rank gets the same number of batches, whose sizes differ by one at most, because a
    forward pass may be a collective. A batch can be empty when there are more ranks than samples.
    """

    def __init__(
        self,
        source: Source,
        *,
        micro_batch: int,
        rank: int,
        ranks: int,
        workers: int | None = None,
        prefetch_bytes: int = 256 * 2**20,
        pin: bool | None = None,
    ) -> None:
        """micro_batch is the maximum number of samples in a batch; the rest as in TrainLoader."""
        self.source = source
        self.num_batches = ceil(len(source) / (ranks * micro_batch))
        self._part = (rank * self.num_batches, ranks * self.num_batches)
        self._fetcher = _Fetcher(source, train=False, workers=workers, pin=pin)
        self._ahead = self._fetcher.ahead(micro_batch, prefetch_bytes)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Batches in the order of the data; keys are sample indices."""
        jobs: deque[_Job] = deque()
        first, pieces = self._part
        for number in range(first, first + self.num_batches):
            # The batches of all ranks together are `pieces` nearly equal slices of the data.
            low, high = (n * len(self.source) // pieces for n in (number, number + 1))
            keys = torch.arange(low, high)
            jobs.append(_Job(self._fetcher, keys, keys))
            if len(jobs) > self._ahead:
                yield self._finish(jobs.popleft())
        while jobs:
            yield self._finish(jobs.popleft())
        self._fetcher.memory.clear()  # there is no other evaluation for a while

    def _finish(self, job: _Job) -> Batch:
        batch = self._fetcher.finish(job)
        return batch.pin() if self._fetcher.pin else batch

    def close(self) -> None:
        """Ends the threads."""
        self._fetcher.close()
