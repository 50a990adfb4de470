"""Who may import whom. The layout is a promise; this file keeps it."""

import ast
import sys
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dist_looksam"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up. A floor imports itself and floors below it. A part of the package that is not
# named here (data, models, world, ...) may be used by any floor from backends upwards.
FLOORS = ["errors", "maths", "optim", "backends", "engine", "fit", "cli"]
FOUNDATION = {"errors", "maths", "optim"}

# An optional library and the only files that may import it.
OPTIONAL = {
    "deepspeed": ("backends/zero*.py", "backends/*deepspeed*.py"),
    "horovod": ("backends/horovod*.py",),
}
IN_ONE_FILE = ["mpi4py", "simplejpeg", "timm", "wandb", "tensorboard", "pytorch_optimizer"]
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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    mine = part(path)
    for other in parts_imported(path):
        if mine in FOUNDATION:
            assert other in FLOORS and FLOORS.index(other) < FLOORS.index(mine), (
                f"{path} imports {other}: {mine} may import {FLOORS[: FLOORS.index(mine)]} only"
            )
        elif mine in FLOORS and other in FLOORS:
            assert FLOORS.index(other) < FLOORS.index(mine), (
                f"{path} imports {other}, which stands above {mine} in {FLOORS}"
            )


def test_no_two_parts_of_the_package_import_each_other():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(part(path), set()).update(parts_imported(path))
    graph.pop("__init__")  # the package's own front door imports all, nobody imports it
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(e.args[1]))}")


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
def test_a_transport_library_is_imported_in_its_own_files_only(library):
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
    source = "from . import engine\nfrom .errors import ConfigError\n"
    found = imports(PACKAGE / "fit.py", source=source)
    assert {"dist_looksam.engine", "dist_looksam.errors"} <= found
