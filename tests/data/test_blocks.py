"""--shuffle block:B,W,c: a permutation, mixed as by chance, the same on any ranks, resumable."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import samples, write_shard

from dist_looksam.cli.main import main
from dist_looksam.data import TrainLoader, load
from dist_looksam.data.blocks import BlockOrder, Blocks, check_mixed, order_of
from dist_looksam.errors import ConfigError
from dist_looksam.run import resume
from dist_looksam.settings.config import Settings

IMAGENET, CLASSES = 1_281_167, 1000
IN_TURN = Blocks(128, 512, 8)
MANY = [*range(1, 200), *range(200, 4090, 29), *range(4090, 4098)]


def written_out(size: int, seed: int, epoch: int, blocks: Blocks) -> list[int]:
    """The definition, one row at a time."""
    count = -(-size // blocks.rows)
    raw = np.random.Philox(key=[seed, epoch]).random_raw(count)
    chosen = sorted(range(count), key=lambda b: raw[b])
    stream = []
    for w in range(-(-count // blocks.window)):
        rows = [
            (slot, row)
            for slot, b in enumerate(chosen[w * blocks.window : (w + 1) * blocks.window])
            for row in range(b * size // count, (b + 1) * size // count)
        ]
        key = np.array([seed ^ 0x9E3779B97F4A7C15, epoch * 2**32 + w], dtype=np.uint64)
        numbers = np.random.Philox(key=key).random_raw(len(rows))
        window, seen = [], {}
        for number, (slot, row) in sorted(zip(numbers, rows)):
            rank = seen[slot] = seen.get(slot, -1) + 1
            turn = (rank // blocks.turn, slot, rank) if blocks.turn else number
            window.append((turn, row))
        stream += [row for _, row in sorted(window)]
    return stream


@pytest.mark.parametrize("blocks", [Blocks(7, 3, 2), Blocks(7, 3, 0), Blocks(1, 5, 1)])
def test_the_order_is_the_one_of_its_definition(blocks):
    for size in (1, 2, 20, 100):
        order = BlockOrder(size, 5, blocks)
        for epoch in (0, 3):
            assert order.permutation(epoch).tolist() == written_out(size, 5, epoch, blocks)


@pytest.mark.parametrize("blocks", [Blocks(64, 32, 8), Blocks(5, 3, 2), Blocks(10**4, 1, 3)])
def test_every_epoch_is_a_permutation_of_any_number_of_images(blocks):
    for size in MANY:
        rows = BlockOrder(size, 1, blocks).permutation(2)
        assert torch.equal(rows.bincount(minlength=size), torch.ones(size, dtype=torch.int64))


def test_any_positions_of_any_epochs_are_found_at_random():
    order = BlockOrder(1000, 3, Blocks(8, 16, 4))
    whole, epochs = order.at(torch.arange(5000))
    mixed = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    indices, found = BlockOrder(1000, 3, Blocks(8, 16, 4)).at(mixed)
    assert indices.equal(whole[mixed]) and found.equal(epochs[mixed])
    assert not whole[:1000].equal(whole[1000:2000])


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    """An epoch of ImageNet's size."""
    rows = BlockOrder(IMAGENET, 0, IN_TURN).permutation(1).numpy()
    assert (np.bincount(rows, minlength=IMAGENET) == 1).all()
    return rows


def test_classes_are_mixed_within_5_percent_of_chance_at_imagenets_size(stream):
    """Ten packings, each mixed by a seed of its own: one has 1,281 neighbours of one class, whose
    deviation by chance is 3 %. Where rows lie by class, it is 7 to 800 times chance."""
    same, spread = [], {4096: [], 32768: []}
    for seed in range(10):
        labels = np.random.default_rng(seed).permutation(np.arange(IMAGENET) % CLASSES)[stream]
        same.append(float((labels[1:] == labels[:-1]).mean()))
        for batch, found in spread.items() if seed < 2 else ():
            parts = len(labels) // batch
            places = np.arange(parts * batch) // batch * CLASSES + labels[: parts * batch]
            counts = np.bincount(places, minlength=parts * CLASSES)
            found.append(float(((counts - batch / CLASSES) ** 2).mean()))
    assert np.mean(same) == pytest.approx(1 / CLASSES, rel=0.05)
    for batch, found in spread.items():
        chance = batch / CLASSES * (1 - 1 / CLASSES) * (IMAGENET - batch) / (IMAGENET - 1)
        assert np.mean(found) == pytest.approx(chance, rel=0.05)


def test_a_node_reads_its_blocks_once_and_from_end_to_end(stream):
    """With W c = batch_size: of 8 nodes, each needs an eighth of a window's blocks."""
    steps = stream[: 15 * 4096].reshape(15, 8, 512)  # steps, nodes, samples
    for node in range(8):
        blocks = np.unique(steps[:, node] // 128)
        assert len(blocks) <= 512 / 8 * 2 + 2  # a block of the definition spans two of these


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_have_the_batch_of_one_rank_and_a_resume_needs_no_replay(two, ranks):
    source = load("digits", augment="none").train

    def batch(ranks: int, steps: list[int]) -> list[torch.Tensor]:
        how = {
            "seed": 3,
            "batch_size": 12,
            "micro_batch": 2,
            "shuffle": "block:8,6,2",
        }
        loaders = [TrainLoader(source, rank=rank, ranks=ranks, **how) for rank in range(ranks)]
        parts = [part for t in steps for loader in loaders for part in loader.step(t)]
        keys = torch.cat([part.keys for part in parts])
        return torch.cat([part.images for part in parts])[keys.argsort()]

    whole = batch(1, [0, 1, 2, 3])
    assert batch(ranks, [0, 1, 2, 3]).equal(whole)
    assert batch(ranks, [3]).equal(whole[36:])
    (full,) = TrainLoader(source, seed=3, batch_size=12, micro_batch=12, rank=0, ranks=1).step(0)
    assert not whole[:12].equal(full.images)


# --- what is refused -----------------------------------------------------------------------------


def test_images_that_lie_by_class_are_refused_by_their_index(two, tree, packed, capsys):
    for name, place in (("folder", tree), ("tar", packed)):
        with pytest.raises(ConfigError, match=r"needs images mixed when .*--shuffle full"):
            load(name, place, shuffle="block:4,2,1")
    write_shard(two / "train-000000.tar", samples(*[0, 1, 1, 0] * 9))
    main(["data", "index", str(two)])
    assert len(load("tar", two, shuffle="block:4,2,1").train) == 38
    flags = ["--data", "tar", "--data_dir", str(packed), "--shuffle", "block:4,2,1", "--dry_run"]
    capsys.readouterr()
    assert main(["train", *flags, "--batch_size", "4", "--out", str(two / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_neighbours_of_one_class_are_counted_against_chance():
    mixed = torch.from_numpy(np.random.default_rng(0).integers(0, 100, 50_000))
    check_mixed(mixed, "block:1,1,1")
    check_mixed(torch.arange(6).repeat(2), "block:1,1,1")
    for wrong in (mixed.sort().values, mixed.view(-1, 20).sort(1).values.flatten()):
        with pytest.raises(ConfigError, match="of one class in"):
            check_mixed(wrong, "block:1,1,1")
    two = torch.from_numpy(np.random.default_rng(0).integers(0, 2, 5000))
    check_mixed(two, "block:1,1,1")
    with pytest.raises(ConfigError, match="of one class in"):
        check_mixed(two.view(-1, 20).sort(1).values.flatten(), "block:1,1,1")


@pytest.mark.parametrize("text", ["block", "block:1,2", "block:-1,2,3", "block:0,1,1", "half",
                                  "block:1,0,1", "block:100000,100000,8"])  # fmt: skip
def test_a_shuffle_that_is_no_order_is_one_sentence(text):
    with pytest.raises(ConfigError, match=r"^shuffle must .*block:128,512,8\.$"):
        Settings(shuffle=text)


def test_a_run_keeps_its_order_when_it_resumes():
    """Checkpoints from before there was another order have the full permutation."""
    block = Settings(data="digits", shuffle="block:16,8,1").resolved(
        ranks=1, launcher="none", samples=1437
    )
    now = resume.saved_settings(block, load("digits"))
    versions = {"versions": {"torch": str(torch.__version__)}}
    then = SimpleNamespace(extra={"settings": now}, path="step-1", step=1, manifest=versions)
    assert now["shuffle"] == "block:16,8,1" and resume._compare(then, now) == []
    old = {name: value for name, value in now.items() if name != "shuffle"}
    for settings in (old, {**now, "shuffle": "block:16,8,2"}):
        then.extra["settings"] = settings
        with pytest.raises(ConfigError, match="shuffle must be as in the checkpoint"):
            resume._compare(then, now)
    then.extra["settings"] = old
    assert resume._compare(then, {**now, "shuffle": "full"}) == []


def test_held_out_images_leave_the_others_in_the_order_of_the_files():
    plain, blocks = (load("digits", holdout=100, shuffle=s).train for s in ("full", "block:8,8,1"))
    assert sorted(plain.indices.tolist()) == blocks.indices.tolist() != plain.indices.tolist()
    assert isinstance(order_of("block:8,8,1", 10, 0), BlockOrder)


def test_a_dry_run_says_what_the_order_is_and_when_nodes_share_blocks(capsys, tmp_path):
    run = ["train", "--data", "digits", "--dry_run", "--ranks", "4", "--out", str(tmp_path)]
    for turn, notes in ((2, 1), (8, 0)):
        flags = ["--batch_size", "128", "--shuffle", f"block:8,16,{turn}"]
        assert main([*run, *flags]) == 0
        said = capsys.readouterr().out
        assert f"order       blocks of 8 images, 16 blocks in a window of 128, {turn} of e" in said
        assert said.count("micro_batch x ranks = 128, each node reads its own") == notes
