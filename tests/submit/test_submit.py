"""`dist-looksam submit`: the checks before a run, and that `jobs`, `logs` and `cancel` know it."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dist_looksam import project
from dist_looksam.cli.main import main
from dist_looksam.record import jobs
from dist_looksam.submit.partitions import seconds_of

FLAGS = shlex.split("--data digits --model vit_8 --batch_size 32 --steps 2 --optimizer look_sam")
CPU = ["--device", "cpu"]
SINFO = """\
batch*|up|2-00:00:00|1-infinite|6|idle|gpu:a100:4(S:0-1)
batch*|up|2-00:00:00|1-infinite|2|alloc|gpu:a100:4(S:0-1)
batch*|up|2-00:00:00|1-infinite|3|drain|gpu:a100:4(S:0-1)
batch*|up|2-00:00:00|1-infinite|1|down*|gpu:a100:4(S:0-1)
debug|up|30:00|1-2|4|mix|(null)
old|inact|infinite|1-infinite|4|idle|(null)
"""


class Site:
    """A folder where commands run, with programs that print what SLURM's would."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture) -> None:
        self.bin, self.capsys = folder / "bin", capsys
        self.bin.mkdir()
        self.program("sinfo", SINFO)

    def program(self, name: str, text: str = "", code: int = 0) -> None:
        path = self.bin / name
        called = f'echo "PYTHON=$PYTHON $@" >>{self.bin}/{name}.called'
        path.write_text(f"#!/bin/sh\n{called}\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        path.chmod(0o755)

    def python(self, script: str) -> None:
        path = self.bin / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def __call__(self, *words: str) -> tuple[int, str]:
        """The exit code, and what was printed: of an error only that."""
        self.capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = self.capsys.readouterr()
        return code, err if code else out

    def row(self) -> dict[str, str]:
        """The only row of `jobs`."""
        assert self("jobs", "--json")[0] == 0
        (row,) = jobs.table(Path("runs"))
        return row


@pytest.fixture
def site(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    for name in ("SITE", "PYTHON", "OUT", "SBATCH_PARTITION", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return Site(tmp_path, capsys)


def until(what, seconds: float = 90.0):
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return value


def test_two_ranks_here_are_in_jobs_from_the_start_to_the_end(site):
    code, printed = site("submit", "--gpus", "2", "--on", "here", "--", *FLAGS, *CPU)
    assert code == 0
    assert f"bash {project.FOLDER}/launch/torchrun.sh {shlex.join([*FLAGS, *CPU])} --out" in printed
    assert f"RANKS=2 PYTHON={sys.executable} " in printed
    row = site.row()
    assert (row["run"], row["state"]) == ("runs/submit-0", "starting")
    code, said = site("submit", "--on", "here", "--", *FLAGS, *CPU, "--out", "runs/submit-0")
    assert code == 2 and "must not be in use, got runs/submit-0, whose run is starting" in said
    until(lambda: site.row()["state"] not in ("starting", "running"))
    assert (site.row()["state"], site.row()["step"]) == ("finished", "2/2")
    assert json.loads(Path("runs/submit-0/summary.json").read_text())["world_size"] == 2
    code, said = site("logs", "runs/submit-0")
    assert code == 0 and "step 2/2 evaluation" in said
    assert site("cancel", "runs/submit-0") == (0, "runs/submit-0 is not running\n")

    code, said = site("submit", "--on", "here", "--", *FLAGS, *CPU, "--out", "runs/submit-0")
    assert code == 2 and "out must be free, got runs/submit-0 with an older run; continue" in said
    words = ["--gpus", "2", "--on", "here", "--print", "--", *FLAGS, *CPU, "--out", "runs/submit-0"]
    code, said = site("submit", *words, "--resume", "auto")
    assert code == 0 and "at step 2, from runs/submit-0/checkpoints/step-2" in said


def test_a_launcher_that_dies_at_its_start_is_in_jobs_with_its_reason(site, monkeypatch):
    noise = "for i in $(seq 30); do echo torchrun: an error_file of rank $i; done"
    site.python(f"echo 'error: no module named torch'; {noise}; exit 1")
    monkeypatch.setenv("PYTHON", f"{site.bin}/python")
    assert site("submit", "--on", "here", "--", *FLAGS, *CPU, "--out", "runs/dead")[0] == 0
    until(lambda: site.row()["state"] != "starting")
    row = site.row()
    assert (row["run"], row["state"]) == ("runs/dead", "stopped")
    assert row["reason"] == "error: no module named torch"
    assert "no module named torch" in site("logs", "runs/dead")[1]

    site.python("exec sleep 60")  # the folder of a dead start is free
    assert site("submit", "--on", "here", "--", *FLAGS, *CPU, "--out", "runs/dead")[0] == 0
    assert site.row()["state"] == "starting"
    code, said = site("cancel", "runs/dead")
    assert code == 0 and said.startswith("runs/dead: told process ")
    until(lambda: site.row()["state"] == "stopped", 10)


def test_the_printed_command_names_all_variables_of_the_shell_that_the_job_takes(site, monkeypatch):
    """Typed again in another shell, the printed command had lost SITE, which it did not name."""
    site.program("sbatch")
    monkeypatch.setenv("SITE", "cluster/sites/our cluster.sh")
    monkeypatch.setenv("CONTAINER", "looksam.sif")
    code, printed = site("submit", "--nodes", "8", "--gpus", "4", "--print", "--", *FLAGS)
    assert code == 0 and not (site.bin / "sbatch.called").exists()
    wanted = "SITE='cluster/sites/our cluster.sh' CONTAINER=looksam.sif "
    assert wanted + "sbatch" in printed  # with the Python of the container
    monkeypatch.setenv("PYTHON", "/opt/python")
    printed = site("submit", "--nodes", "8", "--gpus", "4", "--print", "--", *FLAGS)[1]
    assert wanted + "PYTHON=/opt/python sbatch" in printed


def test_a_slurm_job_is_in_jobs_under_its_run_before_it_begins(site):
    site.program("sbatch", "17")
    output = Path("slurm-17.out").absolute()
    show = f"JobId=17 JobName=looksam JobState=PENDING Reason=Priority StdOut={output}"
    site.program("scontrol", show)
    site.program("squeue", "17|PENDING||Priority|looksam")
    site.program("scancel")
    words = ["--nodes", "8", "--gpus", "4", "--time", "1-0", "--sbatch=--account 'a b'"]
    code, printed = site("submit", *words, "--", *FLAGS)
    assert code == 0 and "partition batch: 8 of 8 nodes, at most 2-00:00:00" in printed
    script = f"{project.FOLDER}/launch/slurm.sbatch"
    command = (
        "sbatch --parsable --nodes=8 --ntasks-per-node=4 --gpus-per-node=4 --time=1-0 --account "
        f"'a b' {script} {shlex.join(FLAGS)}"
    )
    assert f"PYTHON={sys.executable} {command}\n" in printed
    called = (site.bin / "sbatch.called").read_text()
    assert called == f"PYTHON={sys.executable} {command.replace(chr(39), '')[7:]}\n"
    row = site.row()
    assert (row["run"], row["job"], row["state"]) == ("runs/slurm-17", "17", "waiting")
    words = ["--nodes", "8", "--gpus", "4", "--", *FLAGS, "--out", "runs/slurm-17"]
    assert "whose run is waiting" in site("submit", *words)[1]
    assert site("cancel", "runs/slurm-17")[1] == "runs/slurm-17: SLURM job 17 cancelled\n"

    output.write_text("slurmstepd: error: no such user\n")  # died, and SLURM has forgotten it
    site.program("scontrol", "Invalid job id specified")
    site.program("squeue")
    assert site.row()["state"] == "stopped"
    assert site("logs", "17") == (0, "slurmstepd: error: no such user\n")
    assert site("cancel", "17") == (0, "runs/slurm-17 is not running\n")


def test_cancel_takes_the_name_of_a_job_that_has_no_run_yet(site):
    site.program("squeue", "8|PENDING||Priority|ours\n9|PENDING||Priority|two\n10|RUNNING|||two")
    site.program("scontrol", "JobId=8 JobName=ours JobState=PENDING")
    site.program("scancel")
    assert [row["run"] for row in jobs.table(Path("runs"))] == ["(ours)", "(two)", "(two)"]
    assert site("cancel", "(ours)") == (0, "(ours): SLURM job 8 cancelled\n")
    code, said = site("cancel", "(two)")
    assert code == 2 and "must name one job, got (two), the name of 9, 10; give a number" in said


def test_the_machines_of_a_hostfile_are_started_by_what_is_there(site):
    Path("hosts").write_text("# ours\nnode1 slots=8\nnode2 slots=8 max_slots=8\nnode3 slots=4\n")
    site.program("pdsh")
    words = ["--hostfile", "hosts", "--nodes", "2", "--gpus", "8", "--print"]
    code, said = site("submit", *words, "--", *FLAGS)
    launch = f"{project.FOLDER}/launch"
    assert f"HOSTFILE=hosts NODES=2 PYTHON={sys.executable} bash {launch}/deepspeed.sh" in said
    assert code == 0 and "look_sam, vit_8, zero, 2 steps" in said and not Path("runs").exists()
    (site.bin / "pdsh").unlink()
    site.program("mpirun")
    if not Path("/usr/bin/pdsh").exists():
        assert (
            f"RANKS=16 PYTHON={sys.executable} bash {launch}/mpi.sh"
            in site("submit", *words, "--", *FLAGS)[1]
        )
    for change, sentence in (
        (("--nodes", "3"), "got 8 and node3 with slots=4 in hosts"),
        (("--nodes", "4"), "nodes must be <= the 3 machines of hosts, got 4"),
        (("--hostfile", "none"), "hostfile must be a file like cluster/hostfile.example, got none"),
    ):
        code, said = site("submit", *words, *change, "--", *FLAGS, "--batch_size", "96")
        assert code == 2 and sentence in said


def test_a_hostfile_with_a_site_or_without_slots_is_not_given_to_deepspeeds_launcher(
    site, monkeypatch
):
    """It left SITE out without a word, and ended in a traceback of its own."""
    Path("hosts").write_text("node1\n")
    site.program("pdsh")
    words = ["--hostfile", "hosts", "--print", "--", *FLAGS]
    code, said = site("submit", *words)
    assert code == 2 and "needs slots=N behind each machine's name, got 'node1' in hosts" in said
    monkeypatch.setenv("SITE", "ours.sh")
    monkeypatch.setenv("MPIRUN", "ours")
    code, said = site("submit", *words)
    assert code == 2 and "SITE with a hostfile needs ours, got none here" in said
    site.program("ours")
    code, said = site("submit", *words)
    assert code == 0 and f"bash {project.FOLDER}/launch/mpi.sh" in said


@pytest.mark.needs("root")
def test_a_full_disk_is_found_before_the_start_and_loses_no_job(site, monkeypatch):
    """The job ran, and its number was in nothing that was printed."""
    site.program("sbatch", "17")
    site.program("scontrol", "JobId=17 JobState=PENDING")
    Path("disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "full", "disk"], check=True)
    try:
        Path("disk/filled").write_bytes(bytes(2**16))
        words = ["--gpus", "4", "--partition", "batch", "--machine", "a100"]
        code, said = site("submit", *words, "--", *FLAGS, "--out", "disk/run")
        assert code == 2 and "out must have room, got disk/run, where nothing can be writ" in said
        assert not (site.bin / "sbatch.called").exists()
        words += ["--skip", "out"]
        code, said = site("submit", *words, "--", *FLAGS, "--out", "disk/run")
        assert code == 0 and "SLURM job 17 will train into disk/run" in said
        assert "disk/run was not written (No space left on device)" in said
    finally:
        subprocess.run(["umount", "disk"], check=True)


REFUSED = [  # options, flags, the sentence
    ("--nodes 9 --gpus 4", "--batch_size 36", "<= the 8 of partition batch that work with 4 GPUs"),
    ("--gpus 8", "", "gpus must be <= the 4 of a node of partition batch, got 8"),
    ("--partition debug", "", "for which sinfo lists none (GRES)"),
    ("--partition debug --nodes 4", "--device cpu", "<= the 2 that partition debug gives one job"),
    ("--partition debug --time 1:00:00", "--device cpu", "time must be <= the 30:00 of partition"),
    ("--partition old", "--device cpu", "partition old must be up"),
    ("--partition bath", "", "partition must be one of batch, debug, old, got bath"),
    ("--time soon", "", "time must be like 30 (minutes), 1:30:00 or 2-12:00:00, got 'soon'"),
    ("--nodes 3", "", "batch_size must be"),
    ("--machine v100", "--model vit_l16 --zero_stage 0 --batch_size 4096 "
     "--data folder --data_dir data", "micro_batch must fit v100's 32 GB"),
    ("--machine x100", "", "gpu must be one of h200, h100"),
    ("", "--data tar --data_dir far", "data_dir must be here as on the nodes, got far"),
    ("", "--data tar --data_dir data", "shards like train-000000.tar, got none in data"),
    ("", "--init far.pth", "init must be here as on the nodes, got far.pth, which is not"),
    ("", "--init file", "init must be a file of safetensors, or of tensors alone"),
    ("", "--out file/run", "out must be a directory that can be written, got file/run, where"),
    ("", "--dry_run", "submit makes the dry run by itself"),
    ("", "--optimizr sam", "unknown flag, got --optimizr"),
    ("--optimizer sam", "", "flags of train.py must stand behind --, got --optimizer"),
    ("--sbatch=--account='a", "", "sbatch must hold options as in a shell, got"),
    ("--sbatch=--nodes=3", "", "sbatch must hold options that submit has not, got --nodes=3"),
    ("--skip date", "", "skip must name checks: batch, data"),
    ("--nodes 0", "", "nodes must be between 1 and 100,000, got 0"),
    ("--on here --time 10", "", "time is of --on slurm, got --on here"),
    ("--on here --gpus 99", "--batch_size 99 --device cuda", "of this machine, got 99; use --"),
    ("--on here --nodes 2", "", "several nodes need sbatch on the path, or --hostfile FILE, got 2"),
    ("--on hostfile", "", "hostfile must be given with --on hostfile"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "flags", "sentence"), REFUSED)
def test_what_would_fail_later_is_one_sentence_before_anything_is_submitted(
    options, flags, sentence, site
):
    site.program("sbatch", "17")
    Path("data").mkdir()
    Path("file").write_text("")
    data = ("data/train/a", "data/train/b", "data/val/a", "data/val/b")
    for folder in data if "--data folder" in flags else ():
        Path(folder).mkdir(parents=True)
        (Path(folder) / "1.png").write_bytes(b"")
    code, said = site("submit", *options.split(), "--", *FLAGS, *flags.split())
    assert code == 2 and sentence in said and said.count("\n") == 1
    assert not (site.bin / "sbatch.called").exists() and not Path("runs").exists()


def test_a_check_may_be_left_out_and_the_table_says_so(site):
    site.program("sbatch", "17")
    words = ["--gpus", "4", "--print", "--skip", "data,nodes", "--machine", "a100"]
    code, said = site("submit", *words, "--", *FLAGS, "--data", "tar", "--data_dir", "far")
    assert code == 0 and not (site.bin / "sbatch.called").exists()
    found = {line.split()[0]: line.split()[1] for line in said.splitlines()[1:7]}
    assert found == {
        **dict.fromkeys(("batch", "settings", "memory", "out"), "good"),
        **dict.fromkeys(("data", "nodes"), "not"),
    }


GRES = {  # GRES of two states of nodes: the end of the line `memory`
    ("gpu:h100:8(S:0-1)", "gpu:h100:8"): "a rank of 80 GB, h100; the nodes have h100",
    ("gpu:H200:8", "gpu:a100_40gb:4"): "a rank of 40 GB, a100-40; the nodes have H200, a100_40gb",
    ("gpu:a100_1g.10gb:8", "(null)"): "not planned: GPUs are named a100_1g.10gb; name the GPU: --",
    ("gpu:8", "gpu:h100:8"): "not planned: GPUs are named no type, h100; name the GPU: --machine",
}


@pytest.mark.parametrize("gres", GRES)
def test_memory_is_planned_for_the_gpus_that_slurm_names(gres, site):
    """It was planned for h200 wherever --machine was not given."""
    site.program("sbatch")
    site.program("sinfo", "\n".join(f"gpu*|up|1:00|1-infinite|2|idle|{text}" for text in gres))
    words = ["--gpus", "4", "--print"]
    said = site("submit", *words, "--", *FLAGS)[1]
    (line,) = [line for line in said.splitlines() if line.startswith("memory")]
    assert GRES[gres] in line and ("not made" in line) == ("not planned" in line)
    assert "of 141 GB, h200" in site("submit", *words, "--machine", "h200", "--", *FLAGS)[1]


def test_of_several_partitions_one_must_be_able_to_run_the_job(site):
    site.program("sbatch")
    words = ["--gpus", "4", "--print", "--partition"]
    code, said = site("submit", *words, "debug,batch", "--", *FLAGS)
    assert code == 0 and "good  partition batch: 1 of 8 nodes, at most 2-00:00:00\n" in said
    assert " --partition=debug,batch " in said
    for name, sentence in (("debug,old", "partition debug, for which"), ("batch,x", "got x; use")):
        code, said = site("submit", *words, name, "--", *FLAGS)
        assert code == 2 and sentence in said
    said = site("submit", *words, "batch,debug", "--", *FLAGS, *CPU)[1]
    assert "partition batch: 1 of 8 nodes, at most 2-00:00:00 or partition debug: 1 of 4" in said


def test_memory_that_the_named_gpus_lack_is_refused_without_machine(site):
    site.program("sbatch")
    site.program("sinfo", "gpu*|up|1:00|1-infinite|2|idle|gpu:v100:4")
    flags = "--model vit_l16 --zero_stage 0 --batch_size 4096 --data folder --data_dir data"
    for folder in ("data/train/a", "data/train/b", "data/val/a", "data/val/b"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "1.png").write_bytes(b"")
    code, said = site("submit", "--", *FLAGS, *flags.split())
    assert code == 2 and "micro_batch must fit v100's 32 GB" in said


def test_a_hostfile_names_no_gpus_and_the_table_says_what_to_do(site):
    Path("hosts").write_text("node1 slots=8\n")
    site.program("mpirun")
    said = site("submit", "--hostfile", "hosts", "--gpus", "8", "--print", "--", *FLAGS)[1]
    assert "not planned: the type of GPUs is not known; name the GPU: --machine h200|h100" in said


def test_the_out_of_a_config_file_is_the_runs(site):
    """slurm.sbatch passes an --out by the job's number, which would win over the file's."""
    site.program("sbatch", "17")
    Path("c.yaml").write_text(yaml.safe_dump({"out": "runs/mine"}))
    said = site("submit", "--print", "--", *FLAGS, "--config", "c.yaml")[1]
    assert said.endswith("--config c.yaml --out runs/mine\n")


def test_slurms_forms_of_a_time_limit_are_read():
    times = {"30": 1800, "30:15": 1815, "1:30:00": 5400, "2-12": 216000, "1-0:30": 88200}
    assert {text: seconds_of(text) for text in times} == times
    assert seconds_of("infinite") is None and seconds_of("1-02:03:04") == 93784
