"""The wheel alone, installed in an empty folder: every command has what it needs there."""

import inspect
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml
from test_install import build, clone  # noqa: F401 (a fixture)

import dist_looksam

pytestmark = [pytest.mark.slow, pytest.mark.needs("setuptools")]

SWEEP = {
    "settings": {"data": "digits", "model": "vit_8", "steps": 2, "device": "cpu", "workers": 0},
    "batch_size": [32],
    "seeds": [0],
    "methods": {"look_sam": {"k": 2}},
}


class Site:
    """A venv with the wheel of `clone` in it, beside an empty folder where commands run.

    It sees the libraries of these tests, but not their editable install of the package, which is a
    .pth file and therefore ignored in a folder that is itself named by one.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.cwd = folder / "empty"
        self.cwd.mkdir()
        self.bin = folder / "venv" / "bin"
        left_out = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
        self.env = {k: v for k, v in os.environ.items() if k not in left_out}
        self.run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
        offline = ["--no-deps", "--no-index", "--no-cache-dir", "--no-compile", "-q"]
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install"]
        self.run(*pip, *offline, wheel)
        (purelib,) = (folder / "venv").glob("lib/python*/site-packages")
        (purelib / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, *words: object, code: int = 0, **env: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.cwd,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done

    def command(self, *words: object, code: int = 0) -> str:
        """Standard output of `dist-looksam WORDS`, or of standard error if it is to fail."""
        done = self.run(self.bin / "dist-looksam", *words, code=code)
        return done.stderr if code else done.stdout


def check_init(site: Site) -> None:
    assert "recipe.yaml" in site.command("init", "start", "--recipe", "vit_s16-look_sam-4k")
    start = site.cwd / "start"
    assert os.access(start / "launch" / "torchrun.sh", os.X_OK)
    for name in ("slurm.sbatch", "rank.sh", "mpi.sh", "horovod.sh", "deepspeed.sh", "torchrun.sh"):
        text = (start / "launch" / name).read_text()
        assert ".venv" not in text.replace("/opt/dist_looksam/.venv", ""), name  # of the container
        assert f"{site.bin}/python" in text or name == "mpi.sh"  # starts rank.sh
    recipe = yaml.safe_load((start / "recipe.yaml").read_text())
    assert recipe["optimizer"] == "look_sam" and recipe["batch_size"] == 4096
    assert "slots=8" in (start / "cluster" / "hostfile").read_text()
    (start / "recipe.yaml").write_text("mine: 1\n")
    for path in ("train.py", "launch/mpi.sh", "cluster/hostfile"):
        (start / path).unlink()
    assert "init overwrites nothing, got start with " in site.command("init", "start", code=2)
    assert not (start / "train.py").exists(), "it wrote some of its files"
    assert (start / "recipe.yaml").read_text() == "mine: 1\n"


def check_recipes(site: Site) -> None:
    """By name, also under a script of `init`, which starts the wheel's Python."""
    checked = site.command("recipes", "check", "recipe:vit_b16-look_layer_sam-32k")
    assert checked.startswith("good   vit_b16-look_layer_sam-32k.yaml: 11,729 steps")
    site.command("init", "new")
    flags = ["--config", "recipe:vit_b16-sam-4k", "--print_config"]
    printed = site.run("bash", "new/launch/rank.sh", *flags).stdout
    assert yaml.safe_load(printed)["optimizer"] == "sam"
    words = ["--on", "here", "--print", "--", "--data", "digits", "--device", "cpu"]
    printed = site.command("submit", *words).splitlines()[-1]
    assert f"PYTHON={site.bin}/python bash " in printed
    assert "dist_looksam/shipped/launch/torchrun.sh --data digits" in printed


def check_training(site: Site) -> None:
    """A recipe, made small."""
    flags = ["--config", "recipe:vit_s16-look_sam-4k", "--data", "digits", "--data_dir", "none"]
    flags += ["--model", "vit_8", "--batch_size", "32", "--workers", "0"]
    flags += ["--micro_batch", "32", "--m", "32", "--augment", "none", "--device", "cpu"]
    flags += ["--backend", "plain", "--precision", "fp32"]
    site.command("train", *flags, "--steps", "2", "--warmup_steps", "0", "--out", "runs/a")
    summary = json.loads((site.cwd / "runs" / "a" / "summary.json").read_text())
    assert (summary["optimizer"], summary["steps"]) == ("look_sam", 2)
    assert summary["version"] == dist_looksam.__version__ and summary["commit"] is None


def check_tables(site: Site) -> None:
    (site.cwd / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    assert "[1/1]" in site.command("sweep", "sweep.yaml", "--out", "runs/s")
    assert "runs/a " in (jobs := site.command("jobs", "runs")) and "finished" in jobs
    site.command("report", "runs/s", "--out", "report")
    assert (site.cwd / "report" / "index.html").stat().st_size > 10_000
    assert "GB" in site.command("plan", "--gpus", "8", "--config", "recipe:vit_s16-lamb-4k")


def test_every_command_works_from_the_wheel_alone(clone, tmp_path):  # noqa: F811
    """Recipes and slurm.sbatch were looked for beside the package, where a wheel has nothing."""
    wheel = build(clone, "wheel")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dist_looksam/py.typed" in names
    assert not [n for n in names if n.startswith(("launch/", "cluster/", "tests/", "setup"))]
    site = Site(tmp_path, wheel)
    version = f"dist_looksam-{dist_looksam.__version__}.dist-info/METADATA"
    assert site.command("--version").strip() == dist_looksam.__version__ and version in names
    check_init(site)
    check_recipes(site)
    check_training(site)
    check_tables(site)


@pytest.mark.parametrize("name", dist_looksam.__all__)
def test_public_names_have_complete_types(name):
    thing = getattr(dist_looksam, name)
    methods = [(n, m) for n, m in vars(thing).items() if n[0] != "_" or n == "__init__"]
    for label, function in [(name, thing), *methods]:
        function = getattr(function, "fget", None) or getattr(function, "__func__", function)
        if inspect.isfunction(function):
            hints = {**function.__annotations__}
            asked = {*inspect.signature(function).parameters} - {"self", "cls"} | {"return"}
            assert asked <= {*hints}, f"{label}: {asked - {*hints}}"
