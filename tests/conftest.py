"""What a test may ask the machine for, and what happens where the machine has not got it.

    @pytest.mark.needs("horovod", "mpi")

skips the test, with the reason, where Horovod or MPI is missing. With CI=true it fails instead, so
that a machine which lost a library cannot report success.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

# Before torch is loaded, and for every process that a test starts. With more, a thread that has no
# core lets the others turn in circles: on busy cores a small pass took 80 times the processor time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

PROGRAMS = Path(sys.executable).parent  # the virtual environment's: deepspeed, horovodrun, torchrun


def _module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _horovod() -> bool:
    spec = importlib.util.find_spec("horovod")
    folders = spec.submodule_search_locations if spec else None
    return any(any(Path(f, "torch").glob("mpi_lib*.so")) for f in folders or ())


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _setuptools() -> bool:
    import setuptools

    return int(setuptools.__version__.split(".")[0]) >= 68


def _jpeg_in_c() -> bool:
    from dist_looksam.data import jpeg

    return jpeg.built() is not None


def _slurm() -> bool:
    programs = ("slurmctld", "slurmd", "munged", "sbatch", "pdsh", "ip", "nsenter", "mpirun")
    if os.geteuid() != 0 or not all(map(shutil.which, programs)):
        return False
    return subprocess.run(["unshare", "--net", "--mount", "true"]).returncode == 0


@cache
def _timm() -> bool:
    """Whether timm is here. It imports torchvision, which package registries have for GPUs alone:
    beside a torch for CPUs that lacks two operators, and needs them declared."""
    aside = Path(sys.prefix) / "timm"  # see cluster/setup.sh
    if aside.is_dir() and str(aside) not in sys.path:
        sys.path.append(str(aside))
    if not _module("timm"):
        return False
    import torch

    try:
        importlib.import_module("timm")
    except RuntimeError:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
        importlib.import_module("timm")
    return True


NEEDS = {
    "cc": lambda: shutil.which("cc") is not None,
    "setuptools": _setuptools,  # for builds of the package, without network
    "debootstrap": lambda: os.geteuid() == 0 and shutil.which("debootstrap") is not None,
    "deepspeed": lambda: _module("deepspeed"),
    "horovod": _horovod,
    "jpeg_in_c": _jpeg_in_c,
    "mkdocs": lambda: all(map(_module, ("mkdocs", "material", "mkdocstrings"))),
    "mpi": lambda: shutil.which("mpirun") is not None and _module("mpi4py"),
    "root": lambda: os.geteuid() == 0,
    "slurm": _slurm,  # cluster/testbed/ can be started: root, its programs, namespaces
    "pyarrow": lambda: _module("pyarrow"),
    "pytorch_optimizer": lambda: _module("pytorch_optimizer"),
    "accelerate": lambda: _module("accelerate"),
    "lightning": lambda: _module("lightning"),
    "simplejpeg": lambda: _module("simplejpeg"),
    "tensorboard": lambda: _module("tensorboard"),
    "fashion_mnist": lambda: Path("/usr/share/datasets/fashion-mnist").is_dir(),
    "chromium": lambda: any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    "cuda": _cuda,
    "ruff": lambda: shutil.which("ruff") is not None,
    "timm": _timm,
    "timm_aside": lambda: (Path(sys.prefix) / "timm").is_dir(),  # see cluster/setup.sh
    "transformers": lambda: _module("transformers"),
    "triton": lambda: _module("triton"),
    "wandb": lambda: _module("wandb"),
    "webdataset": lambda: _module("webdataset"),
}
NOT_ON_EVERY_MACHINE = {"cuda"}  # skipped under CI, too


def _require(*names: str) -> None:
    for name in names:
        if name not in NEEDS:
            raise ValueError(f"needs({name!r}) is not known; known are {sorted(NEEDS)}")
        if NEEDS[name]():
            continue
        if name in NOT_ON_EVERY_MACHINE:
            pytest.skip(f"{name} is not here, and no part of the set-up")
        reason = f"{name} is not here (bash cluster/setup.sh --all)"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}, and CI=true allows no skipping", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def needs():
    """For a need that is known only inside the test: `needs("horovod")`."""
    return _require


TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*names): skip where missing; fail with CI=true")
    config.addinivalue_line("markers", "slow: takes several seconds; run.sh --quick leaves it out")
    config.addinivalue_line("markers", "alone: measures time; run.sh runs nothing beside it")
    for folder in sorted(p.name for p in TESTS.iterdir() if p.is_dir()):
        config.addinivalue_line("markers", f"{folder}: tests of the folder tests/{folder}/")
    # Programs of the virtual environment are found also when it was not activated.
    os.environ["PATH"] = f"{PROGRAMS}{os.pathsep}{os.environ.get('PATH', '')}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test has its folder's name as a mark: `pytest -m "optim or engine"`."""
    for item in items:
        inside = item.path.relative_to(TESTS).parts
        if len(inside) > 1:
            item.add_marker(inside[0])


@pytest.fixture(scope="session", autouse=True)
def draw_curves():
    """What draws curves.png at the end of a run. Runs of tests leave it out, for it takes longer
    than most of them train; a test that wants it puts it back."""
    from dist_looksam.run import results

    draw = results._draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_draw", lambda out: "curves.png was not drawn")
        yield draw


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        _require(*mark.args)
