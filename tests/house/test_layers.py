"""Who may import whom. The layout is a promise; this file keeps it."""

import ast
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dist_looksam"
FILES = sorted(PACKAGE.rglob("*.py"))

# Every room, from the ground up: a room imports itself and rooms below it. `cli.main` names the
# modules of its commands and imports one when it is called.
FLOORS = [
    *(
        "errors",
        "files",
        "project",
        "rows",
        "cli",
        "kernels",
        "maths",
        "data",
        "models",
        "world",
        "optim",
    ),
    *("backends", "engine"),
    *("checkpoint", "record", "settings", "flatness", "report", "watch"),
    *("plan", "measure", "run", "submit", "sweep"),
]
FOUNDATION = {
    "errors",
    "rows",
    "kernels",
    "maths",
    "optim",
}  # these may import one another and nothing else

# An optional library and the only files that may import it.
OPTIONAL = {
    "deepspeed": ("backends/zero/*.py",),
    "horovod": ("backends/horovod/*.py",),
    "altair": ("report/*.py",),
    "vl_convert": ("report/*.py",),
    "jinja2": ("report/*.py",),
    "triton": ("kernels/code.py",),
}
IN_ONE_FILE = [
    "mpi4py",
    "simplejpeg",
    "timm",
    "wandb",
    "tensorboard",
    "pytorch_optimizer",
    "pyarrow",
]
SAYS_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc"}


def imports(path: Path, *, source: str | None = None) -> set[str]:
    """Full dotted names `path` imports, anywhere in it; `from a import b` gives both a and a.b."""
    found = set()
    package = ("dist_looksam", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(source if source is not None else path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{a.name}" for a in node.names}
    return found


def mentions(names: set[str], library: str) -> bool:
    return any(n == library or n.startswith(library + ".") for n in names)


def part(path: Path) -> str:
    """The file or folder directly under the package that `path` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


PARTS = {part(f) for f in FILES}


def parts_imported(path: Path) -> set[str]:
    split = [n.split(".") for n in imports(path) if n.startswith("dist_looksam.")]
    return {s[1] for s in split if s[1] in PARTS} - {part(path)}


ROOMS = [f for f in FILES if f != PACKAGE / "__init__.py"]  # the front door imports what it shows


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    mine = part(path)
    for other in parts_imported(path):
        assert FLOORS.index(other) < FLOORS.index(mine), (
            f"{path} imports {other}, which does not stand below {mine} in {FLOORS}"
        )
        assert mine not in FOUNDATION or other in FOUNDATION, (
            f"{path} imports {other}: {mine} may import {sorted(FOUNDATION)} only"
        )


def test_every_room_has_its_floor():
    assert {*FLOORS} == PARTS - {"__init__"}


def test_maths_imports_torch_and_nothing_else():
    allowed = {"torch", "dist_looksam", *sys.stdlib_module_names}
    for path in (PACKAGE / "maths").rglob("*.py"):
        others = {n.split(".")[0] for n in imports(path)} - allowed
        assert not others, f"{path} imports {others}: maths/ imports torch only"


@pytest.mark.parametrize("folder", ["maths", "optim"])
@pytest.mark.parametrize("transport", ["torch.distributed", "deepspeed", "horovod", "mpi4py"])
def test_formulas_know_no_transport(folder, transport):
    for path in (PACKAGE / folder).rglob("*.py"):
        assert not mentions(imports(path), transport), (
            f"{path} imports {transport}: {folder}/ must not know how tensors travel; "
            "take a `reduce` argument"
        )


@pytest.mark.parametrize("library", OPTIONAL)
def test_an_optional_library_is_imported_in_its_own_files_only(library):
    for path in FILES:
        inside = str(path.relative_to(PACKAGE))
        if not any(fnmatch(inside, home) for home in OPTIONAL[library]):
            assert not mentions(imports(path), library), (
                f"{path} imports {library}, which lives in {OPTIONAL[library]}"
            )


@pytest.mark.parametrize("library", IN_ONE_FILE)
def test_an_optional_library_is_imported_in_one_file(library):
    homes = [p for p in FILES if mentions(imports(p), library)]
    assert len(homes) <= 1, f"{library} is imported in {homes}: keep it in one file"


def test_no_file_is_named_for_nothing():
    for top in ("dist_looksam", "tests", "launch", "cluster"):
        for path in (ROOT / top).rglob("*"):
            assert path.stem not in SAYS_NOTHING, f"{path}: name it for what it does"


def test_test_files_have_different_names():
    """pytest refuses to collect two of one name, and then runs nothing at all."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


def test_files_stay_under_400_lines():
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path} has {lines} lines: split it where its subject splits"


def test_the_import_reader_sees_relative_and_local_imports():
    """The rules above are only as good as `imports`: relative forms once slipped through it."""
    source = "from ..backends import zero\ndef f():\n    import horovod.torch as hvd\n"
    found = imports(PACKAGE / "maths" / "ascent.py", source=source)
    assert {"dist_looksam.backends", "dist_looksam.backends.zero", "horovod.torch"} <= found
    source = "from . import optim\nfrom .errors import ConfigError\n"
    found = imports(PACKAGE / "engine.py", source=source)
    assert {"dist_looksam.optim", "dist_looksam.errors"} <= found
