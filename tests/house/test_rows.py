"""What is known about a backend, a base optimizer and a data set stands in its row alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dist_looksam import rows
from dist_looksam.backends.rows import BACKENDS
from dist_looksam.data.sets import SETS
from dist_looksam.errors import ConfigError
from dist_looksam.optim import table
from dist_looksam.optim.bases import BASES
from dist_looksam.optim.table import METHODS
from dist_looksam.plan.layouts import LAYOUTS
from dist_looksam.settings.config import DEFAULTS, Settings

PACKAGE = Path(__file__).parents[2] / "dist_looksam"
NAMES = {*BACKENDS, *BASES, *SETS}
# Rows and what they are made of; names of launchers; colours, with others for names without one.
MAY_NAME = ("backends/", "optim/bases/", "data/sets/", "world/launchers.py")


def strings(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and n.value in NAMES}


def ladders(text: str) -> set[str]:
    """Names that are compared with, or looked up in a dictionary that is spelled out."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            found |= strings(node)
        if isinstance(node, ast.Dict):
            found |= {s for key in node.keys if key is not None for s in strings(key)}
        if isinstance(node, ast.MatchValue):
            found |= strings(node)
    return found


def test_no_name_of_a_row_is_compared_with_outside_the_rows():
    """37 comparisons with a backend's name stood in settings/, plan/ and run/; a base was in five
    files. Adding either meant to find them all."""
    for path in PACKAGE.rglob("*.py"):
        inside = str(path.relative_to(PACKAGE))
        if not inside.startswith(MAY_NAME):
            names = ladders(path.read_text())
            assert not names, f"{inside} asks for {names}: ask the row for what it differs in"


@pytest.mark.parametrize("text", [
    'x.backend == "zero"', 'x in ("ddp", "plain")', 'A = {"lamb": 2}', '{"digits": 1}.get(x)',
    'match x:\n    case "fsdp2":\n        pass',
])  # fmt: skip
def test_the_search_for_ladders_finds_them(text):
    assert ladders(text)


def test_a_file_in_the_folder_is_a_row(tmp_path, monkeypatch):
    (tmp_path / "kinds").mkdir()
    row = "from types import SimpleNamespace\nROW = SimpleNamespace(name={!r}, place={})\n"
    for stem, place in (("b", 99), ("a", 99), ("z", 1)):
        (tmp_path / "kinds" / f"{stem}.py").write_text(row.format(stem, place))
    (tmp_path / "kinds" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert list(rows.load_rows("kinds", [str(tmp_path / "kinds")])) == ["z", "a", "b"]
    (tmp_path / "kinds" / "copy.py").write_text(row.format("a", 99))
    with pytest.raises(ValueError, match="names must differ, got a, a, b, z in kinds"):
        rows.load_rows("kinds", [str(tmp_path / "kinds")])


def test_rows_are_whole():
    """A flag that only some backends have is a setting; a layout has its formulas; every base is a
    method of its own name, and takes flags that there are."""
    for row in BACKENDS.values():
        assert row.flags <= {*DEFAULTS} and (row.layout is None or row.layout in LAYOUTS)
    for name, base in BASES.items():
        assert METHODS[name].base == name and METHODS[name].ascent is None
        assert base.uses <= {"betas", "momentum", "eps"}
    for own in SETS.values():
        assert own.data_dir in ("may", "needs", "never")


def test_every_row_is_in_the_help_and_no_library_of_one_is_loaded():
    """--help must not wait for DeepSpeed."""
    code = (
        "import sys; from dist_looksam.run.train import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('deepspeed', 'horovod', 'timm', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    words = {*done.stdout.replace(",", " ").replace(";", " ").split()}
    assert words >= NAMES | {*METHODS}, (NAMES | {*METHODS}) - words
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_base_that_is_not_known_is_a_sentence():
    """`build_base` made a Lamb of any name that it did not know."""
    with pytest.raises(ConfigError, match=r"base must be one of sgd, .*got 'adam'"):
        table.build_base("adam", [], lr=0.1)


@pytest.mark.parametrize("launcher, ranks, flags, backend", [
    ("", 1, {}, "plain"), ("", 2, {}, "ddp"), ("torchrun", 2, {"zero_stage": 1}, "zero"),
    ("deepspeed", 1, {}, "zero"), ("horovod", 2, {"zero_stage": 1}, "horovod"),
    ("deepspeed", 2, {"backend": "ddp"}, "ddp"),
])  # fmt: skip
def test_auto_is_the_backend_of_the_launcher_then_of_a_setting_then_of_the_ranks(
    launcher, ranks, flags, backend
):
    settings = Settings(data="digits", **flags)
    assert settings.for_ranks(ranks=ranks, launcher=launcher).backend == backend
