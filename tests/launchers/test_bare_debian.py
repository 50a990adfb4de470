"""The recipes of a container, run in a bare Debian folder: see bare_debian.py.

Python packages and Horovod's wheel are this machine's; `python tests/launchers/bare_debian.py
FOLDER` downloads and builds all of it. Debian with the packages of steps.sh is stored for the next
time in ~/.cache/dist_looksam/, for each version of that file.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import bare_debian
import pytest

import dist_looksam

pytestmark = [pytest.mark.slow, pytest.mark.needs("debootstrap", "deepspeed")]


def stored() -> Path:
    steps = (bare_debian.RECIPES / "steps.sh").read_bytes() + Path("/etc/os-release").read_bytes()
    key = hashlib.sha256(steps).hexdigest()[:10]
    return Path.home() / ".cache" / "dist_looksam" / f"debian-{key}"


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """(the folder after `docker build`, the command of CMD)."""
    here = "{}.{}".format(*sys.version_info)
    debian = subprocess.run(["apt-cache", "show", "python3"], capture_output=True, text=True).stdout
    if f"\nVersion: {here}." not in debian:
        end = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        end(f"Debian's python3 cannot take the packages of this one, {here}")
    root = tmp_path_factory.mktemp("image") / "root"
    try:
        if stored().exists():
            subprocess.run(["cp", "-a", stored(), root], check=True)  # with devices as devices
        folder = bare_debian.bootstrapped(root)
        folder.take_packages(Path(sysconfig.get_path("purelib")))
        torch = f"torch=={version('torch').partition('+')[0]}"
        command = bare_debian.build(folder, TORCH=torch)
        yield folder, command
        if not stored().exists():
            store(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def store(root: Path) -> None:
    """For the next time: Debian without the project, its run and this machine's settings of apt."""
    for name in ("opt", "run2", "etc/apt"):
        shutil.rmtree(root / name)
    for old in stored().parent.glob("debian-*"):
        shutil.rmtree(old)
    unfinished = stored().with_name(f"debian-{os.getpid()}")
    shutil.move(root, unfinished)
    unfinished.rename(stored())


def files(project: Path) -> set[Path]:
    return {path.relative_to(project) for path in project.rglob("*")}


def test_both_recipes_copy_the_same_files_and_run_the_same_steps(tmp_path):
    """Without the folders that git ignores, whatever their size."""
    bare_debian.copy(bare_debian.ROOT, tmp_path / "docker")
    bare_debian.set_up(tmp_path / "apptainer")
    copied = files(tmp_path / "docker")
    assert copied == files(tmp_path / "apptainer/opt/dist_looksam")
    assert Path("cluster/container/steps.sh") in copied
    assert not {".git", ".venv", ".cache"} & {path.parts[0] for path in copied}
    given = {"TORCH": "torch==2.4", "HOROVOD": "0"}
    (run,) = [rest for word, rest in bare_debian.instructions() if word == "RUN"]
    for name, value in given.items():
        run = run.replace(f"${name}", value)
    assert bare_debian.sections(**given)["post"].strip() == run


def test_the_image_starts_and_trains_on_two_ranks_of_mpirun(image):
    folder, command = image
    assert "usage: dist-looksam" in folder.run(command)
    assert dist_looksam.__version__ in bare_debian.start(folder, "--version")
    bare_debian.train(folder)
    summary = json.loads((folder.root / "run2/summary.json").read_text())
    assert (summary["world_size"], summary["backend"], summary["steps"]) == (2, "zero", 2)
    installed = folder.root / "opt/dist_looksam/.venv/lib"
    assert list(installed.glob("python*/site-packages/horovod/torch/mpi_lib*.so"))


def test_no_mount_is_left(image):
    folder, _ = image
    assert str(folder.root) not in Path("/proc/self/mounts").read_text()
