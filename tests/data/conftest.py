from pathlib import Path

import pytest
from pictures import write_tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """12 training and 6 test pictures of cats and dogs, as far as their names go."""
    return write_tree(tmp_path / "pictures")
