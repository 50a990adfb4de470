from pathlib import Path

import pytest
from pictures import samples, write_shard, write_tree

from dist_looksam.cli.main import main


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """12 training and 6 test pictures of cats and dogs, as far as their names go."""
    return write_tree(tmp_path / "pictures")


@pytest.fixture
def packed(tree: Path, tmp_path: Path) -> Path:
    assert main(["data", "pack", str(tree), str(tmp_path / "packed"), "--shard_mb", "1"]) == 0
    return tmp_path / "packed"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two training shards and one test shard, as another program may write them."""
    write_shard(tmp_path / "train-000000.tar", samples(1, 0, 1))
    write_shard(tmp_path / "train-000001.tar", samples(0, 0, first=3))
    write_shard(tmp_path / "val-000000.tar", samples(1, 0, first=5))
    return tmp_path
