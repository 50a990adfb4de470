import threading
from itertools import chain
from pathlib import Path

import pytest
import torch

from dist_looksam.data import EvalLoader, TrainLoader, load
from dist_looksam.data.batch import Batch
from dist_looksam.data.draws import uniform
from dist_looksam.data.growth import Growth
from dist_looksam.data.order import Order
from dist_looksam.errors import ConfigError, RunError

LAYOUTS = [(1, 24), (1, 12), (2, 6), (3, 4), (3, 2), (4, 6), (4, 2)]


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    """All fields of several batches, on the device, in the order of keys."""
    moved = [batch.to("cpu") for batch in batches]
    order = torch.cat([batch.keys for batch in moved]).argsort()
    names = [name for name, value in vars(moved[0]).items() if isinstance(value, torch.Tensor)]
    return {name: torch.cat([getattr(b, name) for b in moved])[order] for name in names}


def global_batch(source, t: int, ranks: int, micro: int, *, batch_size: int = 24, **options):
    loaders = [
        TrainLoader(source, seed=7, batch_size=batch_size, micro_batch=micro, rank=r, ranks=ranks,
                    **options)
        for r in range(ranks)
    ]  # fmt: skip
    steps = [loader.step(t) for loader in loaders]
    for loader in loaders:
        loader.close()
    return joined(list(chain(*steps)))


def test_micro_batches_of_ranks_take_turns_in_the_global_batch():
    source = load("digits").train
    options = {"seed": 0, "batch_size": 12, "micro_batch": 2, "ranks": 3}
    keys = [
        [batch.keys.tolist() for batch in TrainLoader(source, rank=rank, **options).step(1)]
        for rank in range(3)
    ]
    assert keys == [[[12, 13], [18, 19]], [[14, 15], [20, 21]], [[16, 17], [22, 23]]]


@pytest.mark.parametrize(
    ("t", "more"), [(0, "randaugment,erasing:1"), (60, "trivialaugment,jitter,erasing,repeat:4")]
)
def test_the_global_batch_of_digits_does_not_depend_on_ranks_or_micro_batches(t: int, more: str):
    source = load("digits", augment=f"crop,flip,mixup:1,cutmix,{more}").train
    expected = global_batch(source, t, 1, 24)
    assert expected["keys"].equal(torch.arange(t * 24, t * 24 + 24))
    assert set(expected) == {"images", "labels", "keys", "partner", "lam", "boxes", "erased"}
    for ranks, micro in LAYOUTS[1:]:
        got = global_batch(source, t, ranks, micro)
        for name, value in expected.items():
            assert got[name].equal(value), (name, ranks, micro)


@pytest.mark.parametrize("more", ["randaugment", "3augment,jitter,erasing:0.9"])
def test_the_global_batch_of_files_does_not_depend_on_ranks_or_micro_batches(tree: Path, more: str):
    (tree / "train" / "dog" / "1.jpg").write_bytes(b"damaged")
    augment = f"crop,flip,mixup,cutmix,{more}"
    source = load("folder", tree, image_size=24, augment=augment).train
    source.on_corrupt = lambda text: None
    expected = global_batch(source, 3, 1, 24, workers=0)
    for ranks, micro in LAYOUTS[1:]:
        got = global_batch(source, 3, ranks, micro, workers=2)
        for name, value in expected.items():
            assert got[name].equal(value), (name, ranks, micro)


def test_a_global_batch_may_be_larger_than_the_data():
    source = load("digits").train
    size = len(source)
    loader = TrainLoader(source, seed=0, batch_size=4096, micro_batch=1024, rank=0, ranks=2)
    other = TrainLoader(source, seed=0, batch_size=4096, micro_batch=1024, rank=1, ranks=2)
    assert loader.steps_per_epoch < 1
    assert loader.epoch_of(2) == 2 * 4096 / size
    steps = [both.step(t) for t in range(2) for both in (loader, other)]
    whole = joined(list(chain(*steps)))
    assert whole["keys"].equal(torch.arange(8192))
    counts = whole["labels"][: 5 * size].bincount()
    assert counts.equal(5 * source.labels.bincount())


def test_an_epoch_shows_every_sample_once():
    source = load("digits").train
    source.labels = torch.arange(len(source))  # a label of its own for each sample
    loader = TrainLoader(source, seed=1, batch_size=479, micro_batch=479, rank=0, ranks=1)
    assert loader.steps_per_epoch == 3
    for epoch in range(2):
        seen = joined(list(chain(*(loader.step(3 * epoch + t) for t in range(3)))))["labels"]
        assert seen.sort().values.equal(torch.arange(1437))


@pytest.mark.parametrize("shuffle", ["full", "block:10,4,3"])
def test_three_epochs_of_repeat_3_show_every_sample_three_times_in_three_ways(shuffle: str):
    data = load("digits", augment="crop,repeat,cutmix", holdout=357, shuffle=shuffle)
    source = data.train
    source.labels = torch.arange(1080)  # a label of its own for each sample
    source.source.labels[source.indices] = source.labels
    options = {"seed": 1, "micro_batch": 36, "rank": 0, "ranks": 1, "shuffle": shuffle}
    loader = TrainLoader(source, batch_size=108, **options)
    assert loader.steps_per_epoch == 10 and loader.epoch_of(30) == 3
    parts = [joined(loader.step(t)) for t in range(30)]
    for part in parts:
        assert part["labels"].bincount().sort().values[-36:].tolist() == [3] * 36
        assert (part["labels"] != part["partner"]).all()
    assert torch.cat([part["labels"] for part in parts]).bincount().tolist() == [3] * 1080
    shown = TrainLoader(source, batch_size=108, **options).step(0)  # on the host, not yet mixed
    copies = torch.stack([batch.images for batch in shown])
    differ = (copies[0] != copies[1]).flatten(1).any(1)
    assert differ.double().mean() > 0.8  # of 25 offsets, few are the same


def test_copies_of_a_file_are_augmented_each_by_its_own_position(tree: Path):
    source = load("folder", tree, image_size=24, augment="crop,flip,repeat:2").train
    options = {"seed": 0, "batch_size": 24, "micro_batch": 24, "rank": 0, "ranks": 1}
    (batch,) = TrainLoader(source, **options, workers=0).step(1)
    assert (batch.images[:12] != batch.images[12:]).flatten(1).any(1).all()
    indices, _ = Order(12, seed=0).at(torch.arange(12, 24).repeat(2))
    assert batch.images.equal(source.fetch(indices, torch.arange(24, 48), True)[0])


def test_a_batch_must_hold_whole_repetitions():
    source = load("digits", augment="repeat:3").train
    with pytest.raises(ConfigError, match=r"multiple of 3 .* got 8; use 6 or 9"):
        TrainLoader(source, seed=0, batch_size=8, micro_batch=8, rank=0, ranks=1)


def test_the_seed_of_a_run_draws_boxes_and_shares(tree: Path):
    source = load("folder", tree, image_size=24, augment="mixup,erasing:1").train
    options = {"batch_size": 8, "micro_batch": 8, "rank": 0, "ranks": 1, "workers": 0}
    (one,), (other,) = (TrainLoader(source, seed=s, **options).step(0) for s in (0, 1))
    assert not one.erased.equal(other.erased) and not one.lam.equal(other.lam)
    assert (one.seed, other.seed) == (0, 1)


def test_mixing_ends_at_its_step_and_other_augmentation_goes_on(tree: Path):
    source = load("folder", tree, image_size=24, augment="flip,mixup,erasing").train
    options = {"seed": 0, "batch_size": 8, "micro_batch": 4, "rank": 0, "ranks": 1}
    loader = TrainLoader(source, **options, mixup_until=2, workers=1)
    whole = TrainLoader(source, **options, workers=0)
    for t in range(4):
        for got, expected in zip(loader.step(t), whole.step(t), strict=True):
            assert got.images.equal(expected.images) and got.erased.equal(expected.erased)
            assert (got.lam is None) == (got.partner is None) == (got.boxes is None) == (t >= 2)
            assert got.lam is None or got.lam.equal(expected.lam)
    loader.close()


def test_images_grow_in_equal_parts_of_the_run_on_any_number_of_ranks(tree: Path):
    (tree / "train" / "dog" / "1.jpg").write_bytes(b"damaged")
    augment = "crop,flip,3augment,erasing:0.9,cutmix"
    source = load("folder", tree, image_size=32, augment=augment).train
    source.on_corrupt = lambda text: None
    growth = Growth(first=16, last=32, patch=8, steps=6)
    assert [growth.side(t) for t in range(8)] == [16, 16, 24, 24, 32, 32, 32, 32]
    for t in (0, 3, 5):
        expected = global_batch(source, t, 1, 24, workers=0, growth=growth)
        assert expected["images"].shape == (24, 3, growth.side(t), growth.side(t))
        for ranks, micro in ((2, 6), (3, 4)):
            got = global_batch(source, t, ranks, micro, workers=2, growth=growth)
            assert all(got[name].equal(expected[name]) for name in expected)
    same = global_batch(source, 5, 1, 24, workers=0)
    assert expected["images"].equal(same["images"])


@pytest.mark.parametrize("first", [20, 32, 0])
def test_images_must_begin_at_a_smaller_multiple_of_the_patch(first: int):
    with pytest.raises(ConfigError, match=f"a multiple of the model's patch of 8 .* got {first}"):
        Growth(first=first, last=32, patch=8, steps=9)
    with pytest.raises(ConfigError, match=r"at least the 4 image sizes .* got 3"):
        Growth(first=8, last=32, patch=8, steps=3)


def test_steps_fetched_ahead_equal_steps_asked_for_at_random(tree: Path):
    source = load("folder", tree, image_size=24, augment="crop,flip,mixup").train
    options = {"seed": 0, "batch_size": 16, "micro_batch": 4, "rank": 1, "ranks": 2}
    ahead = TrainLoader(source, **options, workers=2, prefetch=2)
    random = TrainLoader(source, **options, workers=0)
    for t in (0, 1, 2, 3, 9, 10, 2, 3):
        got, expected = joined(ahead.step(t)), joined(random.step(t))
        assert all(got[name].equal(expected[name]) for name in expected)
    ahead.close()


def test_later_steps_are_fetched_in_the_background_within_their_bytes(tree: Path):
    source = load("folder", tree, image_size=24).train
    options = {"seed": 0, "batch_size": 8, "micro_batch": 2, "rank": 0, "ranks": 1, "workers": 1}
    micro_bytes = 2 * 3 * 24 * 24
    for limit, ahead in ((2**30, 8), (5 * micro_bytes + 1, 5), (micro_bytes - 1, 0)):
        loader = TrainLoader(source, **options, prefetch=2, prefetch_bytes=limit)
        loader.step(5)
        assert list(loader._jobs) == list(range(24, 24 + ahead))
        for job in loader._jobs.values():
            job.result()
        loader.step(20)  # what is no longer wanted is dropped
        assert all(number >= 84 for number in loader._jobs)
        loader.close()


def test_memory_of_a_batch_is_used_again_only_when_nothing_refers_to_it(tree: Path):
    """Views of torch and of NumPy refer to it too."""
    source = load("folder", tree, image_size=24, augment="crop").train
    how = {"seed": 0, "batch_size": 4, "micro_batch": 4, "rank": 0, "ranks": 1}
    loader = TrainLoader(source, **how, workers=1, prefetch=0, pin=False)

    def images(t: int) -> torch.Tensor:
        return loader.step(t)[0].images

    first = images(0)
    address, row, pixels = first.data_ptr(), first[1:2, :, 3], first.numpy()[2:, 0]
    expected = row.clone(), pixels.copy()
    del first
    second = images(1)
    assert second.data_ptr() != address
    assert row.equal(expected[0]) and (pixels == expected[1]).all()
    del row
    assert images(2).data_ptr() != address
    del pixels
    assert {images(t).data_ptr() for t in (3, 4)} <= {address, images(2).data_ptr()}
    loader.close()


def test_closing_ends_the_threads(tree: Path):
    before = threading.active_count()
    source = load("folder", tree, image_size=24).train
    loader = TrainLoader(source, seed=0, batch_size=8, micro_batch=4, rank=0, ranks=1, workers=3)
    loader.step(0)
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before


def test_an_error_in_a_thread_reaches_the_caller(tree: Path, monkeypatch):
    source = load("folder", tree, image_size=24).train

    def lost(*_):
        raise RunError("gone")

    monkeypatch.setattr(source, "_read", lost)
    loader = TrainLoader(source, seed=0, batch_size=8, micro_batch=4, rank=0, ranks=1, workers=2)
    with pytest.raises(RunError, match="gone"):
        loader.step(0)
    loader.close()


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "ranks", "use"),
    [(100, 8, 3, "use 96 or 120"), (10, 8, 3, "use 24"), (0, 8, 1, "use 8"), (-5, 8, 1, "use 8")],
)
def test_a_batch_that_does_not_divide_names_its_nearest(batch_size, micro_batch, ranks, use):
    source = load("digits").train
    with pytest.raises(ConfigError, match=f"got {batch_size} .*; {use}"):
        TrainLoader(source, seed=0, batch_size=batch_size, micro_batch=micro_batch, rank=0,
                    ranks=ranks)  # fmt: skip


def test_mixing_needs_whole_pairs():
    source = load("digits", augment="mixup").train
    with pytest.raises(ConfigError, match=r"micro_batch must be even .* got 3; use 4"):
        TrainLoader(source, seed=0, batch_size=6, micro_batch=3, rank=0, ranks=2)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro", [1, 50, 1000])
def test_evaluation_shows_every_sample_once_in_as_many_batches_on_every_rank(ranks, micro):
    source = load("digits", augment="crop,flip,mixup").test
    loaders = [EvalLoader(source, micro_batch=micro, rank=r, ranks=ranks) for r in range(ranks)]
    parts = [list(loader) for loader in loaders]
    assert {len(part) for part in parts} == {len(loaders[0])}
    batches = list(chain(*parts))
    assert max(len(batch) for batch in batches) <= micro
    assert max(len(b) for b in batches) - min(len(b) for b in batches) <= 1
    whole = joined(batches)
    assert whole["keys"].equal(torch.arange(360)) and "lam" not in whole
    images = source.fetch(torch.arange(360), torch.arange(360), train=False)[0]
    assert torch.cat([batch.images for batch in batches]).equal(images)


def test_evaluation_of_fewer_samples_than_ranks_has_empty_batches(tree: Path):
    source = load("folder", tree, image_size=24).test
    sizes = []
    for rank in range(8):
        loader = EvalLoader(source, micro_batch=4, rank=rank, ranks=8, workers=1)
        (batch,) = list(loader)
        assert batch.to("cpu").images.shape == (len(batch), 3, 24, 24)
        sizes.append(len(batch))
        loader.close()
    assert sorted(sizes) == [0] * 2 + [1] * 6


def test_evaluation_looks_the_same_every_time_and_ahead(tree: Path):
    source = load("folder", tree, image_size=24).test
    ahead = EvalLoader(source, micro_batch=2, rank=0, ranks=1, workers=2)
    plain = EvalLoader(source, micro_batch=2, rank=0, ranks=1, workers=0)
    assert all(a.images.equal(b.images) for a, b in zip(ahead, plain, strict=True))
    assert all(a.images.equal(b.images) for a, b in zip(ahead, plain, strict=True))
    ahead.close()


@pytest.mark.needs("cuda")
def test_a_gpu_gets_pinned_batches_and_the_same_numbers(tree: Path):
    source = load("folder", tree, image_size=24, augment="crop,flip,mixup,cutmix,erasing:1").train
    loader = TrainLoader(source, seed=0, batch_size=8, micro_batch=8, rank=0, ranks=1)
    (batch,) = loader.step(0)
    loader.close()
    assert batch.images.is_pinned() and batch.labels.is_pinned()
    on_gpu, on_cpu = batch.to("cuda"), batch.to("cpu")
    assert on_gpu.images.cpu().allclose(on_cpu.images, atol=1e-6)
    assert uniform(3, on_gpu.keys, 1000).cpu().equal(uniform(3, batch.keys, 1000))
