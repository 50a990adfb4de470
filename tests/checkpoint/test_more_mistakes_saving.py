"""save and restore with wrong arguments, and a folder that has later steps."""

import pytest
import small

from dist_looksam import ConfigError, restore
from dist_looksam.checkpoint import Writer, save


def engine():
    return small.engine(small.net(), "look_sam", "sgd")


@pytest.mark.parametrize("keep", [-1, -2, 1.5, "2", None, True], ids=repr)
def test_keep_below_zero_deletes_nothing(keep, tmp_path):
    """keep=-1 is "all" in other libraries. Here save deleted all checkpoints, the new one as well,
    and returned its path."""
    own = engine()
    kept = save(own, tmp_path)
    with pytest.raises(ConfigError, match="keep must be a whole number >= 0"):
        save(own, tmp_path, keep=keep)
    with pytest.raises(ConfigError, match="keep must be a whole number >= 0"):
        Writer(own, tmp_path, keep=keep)
    assert kept.is_dir()


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_went_back_keeps_what_it_has_just_written(keep, tmp_path):
    """restore(engine, step-1) in a folder that goes on to step-4, then save with keep=2: step-2 was
    deleted as soon as it was written, being the oldest, and its path was returned."""
    own = engine()
    for t in range(4):
        own.step(small.micro_batches(t))
        save(own, tmp_path)
    back = engine()
    restore(back, tmp_path / "step-1")
    back.step(small.micro_batches(1))
    path = save(back, tmp_path, keep=keep)
    assert path.name == "step-2" and path.is_dir()
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["step-2", "step-4"][:keep]


def test_what_is_no_engine_is_a_sentence(tmp_path):
    own = engine()
    for thing in (own.module, own.optimizer, own.backend, str(tmp_path)):
        with pytest.raises(ConfigError, match="a checkpoint is of an Engine, got a"):
            save(thing, tmp_path)
        with pytest.raises(ConfigError, match="a checkpoint is of an Engine, got a"):
            restore(thing, tmp_path)
    with pytest.raises(ConfigError, match="path must be"):
        restore(own, None)
    with pytest.raises(ConfigError, match="extra must be a dictionary"):
        save(own, tmp_path, [1])
