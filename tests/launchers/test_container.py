"""The two recipes of a container run the same steps, and CONTAINER puts Python into it.

No image is built here; test_bare_debian.py runs the steps.
"""

import re
import subprocess
from pathlib import Path

import pytest
from test_launch_scripts import ROOT, call, job

HERE = ROOT / "cluster" / "container"
RECIPES = ("Dockerfile", "looksam.def")
SRUN = 'while [[ $1 == -* ]]; do shift; done; exec "$@"'
NOTES = 'printf "%s\\n" "$@" >arguments'


def test_both_recipes_run_the_same_steps_with_the_same_base_and_torch():
    for recipe in RECIPES:
        text = (HERE / recipe).read_text()
        ran = re.findall(r"^(?!#).*\bbash (/opt/dist_looksam)/(\S+)", text, re.MULTILINE)
        assert ran == [("/opt/dist_looksam", "cluster/container/steps.sh")], recipe
    for name in ("BASE", "TORCH", "HOROVOD"):
        values = {re.search(rf"{name}=(\S+)", (HERE / r).read_text())[1] for r in RECIPES}
        assert len(values) == 1, (name, values)
    assert (ROOT / "cluster" / "setup.sh").exists() and "bash cluster/setup.sh" in steps()
    assert "bash cluster/horovod/build.sh" in steps()


def steps() -> str:
    return (HERE / "steps.sh").read_text()


def test_the_steps_are_bash_and_install_what_horovod_asks_for():
    assert subprocess.run(["bash", "-n", str(HERE / "steps.sh")]).returncode == 0
    asked = re.search(r"apt-get install ([^)]*)\)", (ROOT / "cluster/horovod/build.sh").read_text())
    wanted = asked[1].split()
    packages = re.search(r"PACKAGES=\(([^)]*)\)", steps())[1].split()
    assert wanted and set(wanted) <= set(packages), set(wanted) - set(packages)


@pytest.mark.needs("root")
def test_a_base_with_another_cuda_than_torchs_is_refused_before_horovod_is_built(tmp_path):
    """The recipes had CUDA 12.8 for a torch of CUDA 13.0: DeepSpeed then compiles no kernel."""
    programs = {
        "container/steps.sh": steps(),
        "setup.sh": "true",
        "horovod/build.sh": "echo built; exit 3",  # and steps.sh ends here
        "../.venv/bin/python": "#!/bin/sh\necho 13.0",
        "../bin/apt-get": "#!/bin/sh",
    }
    for toolkit in ("12.8", "13.1"):
        programs["../bin/nvcc"] = f"#!/bin/sh\necho release {toolkit}, V{toolkit}.1"
        for name, text in programs.items():
            path = tmp_path / "cluster" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
        command = ["bash", str(tmp_path / "cluster/container/steps.sh")]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if toolkit == "12.8":
            assert (done.returncode, done.stdout) == (2, "")
            assert "BASE must have the CUDA of TORCH, 13.0, got 12.8; give another" in done.stderr
        else:
            assert (done.returncode, done.stdout) == (3, "built\n")


@pytest.mark.parametrize("python", ["", "python3.12"])
def test_a_job_with_a_container_runs_python_in_it_on_every_node(python, tmp_path):
    image = tmp_path / "looksam.sif"
    image.touch()
    programs = {"srun": SRUN, "apptainer": NOTES}
    fields = f"JobId=1 JobState=RUNNING Command={ROOT / 'launch' / 'slurm.sbatch'} StdOut=o"
    programs["scontrol"] = f'echo "{fields}"'
    env = {"SLURM_JOB_ID": "1", "CONTAINER": str(image), "PYTHON": python}
    done = call("slurm.sbatch", tmp_path, programs, "--optimizer", "sam", **env)
    assert done.returncode == 0, done.stderr
    ran = (tmp_path / "arguments").read_text().split("\n")
    inside = python or "/opt/dist_looksam/.venv/bin/python"
    assert ran[:7] == ["exec", "--nv", "--bind", str(ROOT), "--bind", str(tmp_path), str(image)]
    assert ran[7:9] == [inside, str(ROOT / "train.py")] and "--optimizer" in ran


def test_a_job_without_a_container_starts_none(tmp_path):
    (tmp_path / "python").write_text(f"#!/bin/bash\n{NOTES}\n")
    (tmp_path / "python").chmod(0o755)
    done, _ = job(tmp_path, SRUN, PYTHON=str(tmp_path / "python"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "arguments").read_text().startswith(str(ROOT / "train.py"))


def test_an_image_that_is_not_there_is_one_sentence_before_the_ranks_start(tmp_path):
    done, _ = job(tmp_path, "touch started", CONTAINER="nowhere.sif")
    assert done.returncode == 2 and not Path(tmp_path, "started").exists()
    assert done.stderr.count("\n") == 1
    assert "CONTAINER must be an Apptainer image that can be read, got nowhere.sif" in done.stderr
