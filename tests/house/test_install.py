"""What pip makes of a clone: an installed package that scripts beside the clone can import."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.needs("setuptools")]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder dist_looksam with what a build reads."""
    folder = tmp_path / "dist_looksam"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("dist_looksam", "launch", "cluster"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def build(clone: Path, kind: str) -> Path:
    """The wheel that `pip install .` or `pip install -e .` would install."""
    program = f"from setuptools.build_meta import build_{kind} as build; build('.')"
    made = subprocess.run(
        [sys.executable, "-c", program], cwd=clone, capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    return next(clone.glob("*.whl"))


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_script_beside_a_clone_imports_the_installed_package(clone, tmp_path, kind):
    """The clone's folder, which has the package's name, came before an editable install: the script
    met an empty package without SAM."""
    site = tmp_path / "site"
    zipfile.ZipFile(build(clone, kind)).extractall(site)
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (tmp_path / "script.py").write_text("from dist_looksam import SAM\nprint(SAM.__module__)\n")
    # -S: without the site-packages of these tests, whose own install would be found.
    start = f"import site, runpy, sys; sys.path[0] = {str(tmp_path)!r}; "
    start += f"site.addsitedir({str(site)!r}); runpy.run_path('script.py')"
    env = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", start],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "dist_looksam.optim.sam\n", done.stderr


def test_ruff_does_not_check_what_a_build_leaves(clone, needs):
    """`pip wheel .` leaves build/, and the checks of the next commit failed in it."""
    build(clone, "wheel")
    assert any((clone / "build").glob("lib*"))
    needs("ruff")
    checked = subprocess.run(["ruff", "check", "--no-cache", "."], cwd=clone, capture_output=True)
    assert checked.returncode == 0, checked.stdout
