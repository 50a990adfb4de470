"""The table of runs where there is no SLURM, and the launch scripts' mistakes."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_looksam.errors import ConfigError, RunError
from dist_looksam.record import jobs, processes, rundir
from dist_looksam.world import World

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ARRAY = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "99"}
FIRST = ARRAY | {"SLURM_ARRAY_TASK_ID": "1"}
UNREACHABLE = {"NODES": "8", "MASTER_ADDR": "192.0.2.1", "MASTER_WAIT": "1"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))  # no squeue, no scontrol
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    folder = tmp_path / "runs" / "a"
    (folder / "checkpoints" / "step-4").mkdir(parents=True)
    (folder / "checkpoints" / "step-4" / "manifest.json").write_text("{}")
    (folder / "config.yaml").write_text("steps: 10\n")
    lines = [{"step": s, "images_per_s": 100.0, "seconds": 2.0 * (s + 1)} for s in range(5)]
    lines.append({"step": 5, "eval_top1": 0.25, "eval_loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


HOLD = """
import sys, time
from pathlib import Path
from dist_looksam.record import rundir
rundir.prepare(Path(sys.argv[1]), resume_step=4)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def held(run):
    """A process whose command line tells nothing holds the run; as the points of a sweep are."""
    command = [sys.executable, "-c", HOLD, str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def lock_says(run: Path, **values) -> None:
    """The lock names another process, which does not hold it."""
    (run / ".lock").write_text(json.dumps(rundir.holder(run) | values))


def test_a_run_whose_process_is_gone_is_stopped(run, held):
    rundir.record(run, World(), ["here"], CPU)
    held.kill()
    held.wait()
    row = jobs.row_of(run)
    assert (row["state"], row["step"], row["top1"]) == ("stopped", "5/10", "25.00%")
    assert (row["images/s"], row["checkpoint"], row["nodes"]) == ("100", "step-4", "here")


def test_a_run_lives_as_long_as_its_lock_is_held_and_can_be_cancelled(run, held):
    """Every running point of a sweep was shown as stopped and could not be cancelled: its command
    line is the sweep's."""
    rundir.record(run, World(), ["here"], CPU)
    row = jobs.row_of(run)
    assert (row["state"], row["eta"]) == ("running", "0:00:10")
    assert jobs.cancel([str(run)]) == 0
    assert held.wait(timeout=10) == -signal.SIGTERM
    assert jobs.row_of(run)["state"] == "stopped"


def test_of_a_run_on_another_host_nothing_is_guessed(run, held):
    """A run elsewhere whose metrics were older than two minutes was called stopped."""
    held.kill()
    held.wait()
    lock_says(run, host="elsewhere")
    assert jobs.row_of(run)["state"] == "unknown"
    with pytest.raises(ConfigError, match="may run on elsewhere, not here"):
        jobs.cancel([str(run)])


def test_of_a_run_on_other_machines_its_launcher_tells_where_it_was_submitted(run, held):
    """A run that `submit` had started by a hostfile was unknown where it had been submitted."""
    rundir.record(run, World(), ["elsewhere"], CPU)
    held.kill()
    held.wait()
    lock_says(run, host="elsewhere")
    launcher = subprocess.Popen(["/bin/sleep", "60"])
    job = json.loads((run / "job.json").read_text())
    job |= {"started_by": processes.named(launcher.pid)}
    (run / "job.json").write_text(json.dumps(job))
    assert jobs.row_of(run)["state"] == "running"
    launcher.kill()
    launcher.wait()
    assert jobs.row_of(run)["state"] == "stopped"
    (run / "job.json").write_text(json.dumps(job | {"started_by": {"host": "other", "pid": 1}}))
    assert jobs.row_of(run)["state"] == "unknown"


def test_a_run_with_a_summary_is_finished_until_it_is_started_again(run):
    (run / "summary.json").write_text("{}")
    assert jobs.row_of(run)["state"] == "finished"
    rundir.record(run, World(), ["here"], CPU)
    assert jobs.row_of(run)["state"] != "finished"


def test_another_process_with_the_old_number_is_not_the_run(run, held):
    """Process numbers are used again. One with "train" anywhere in its command line was taken for
    the run, and `cancel` killed it."""
    held.kill()
    held.wait()
    other = subprocess.Popen(["/bin/sh", "-c", "/bin/sleep 60; : train"])
    try:
        rundir.record(run, World(), ["here"], CPU)
        (run / "job.json").write_text(json.dumps(rundir.job(run) | {"pid": other.pid}))
        lock_says(run, pid=other.pid)
        assert jobs.row_of(run)["state"] == "stopped"
        assert jobs.cancel([str(run)]) == 0
        with (run / ".lock").open() as file:  # as a forked child that outlives the run would
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(ConfigError, match="cancel it there"):
                jobs.cancel([str(run)])
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


QUEUED = [  # scontrol's fields, how often the run had been requeued at its start, the table's word
    ("JobState=PENDING Restarts=0", 0, "waiting"),
    ("JobState=PENDING Restarts=2", 1, "requeued"),
    ("JobState=COMPLETING Restarts=1", 0, "requeued"),
    ("JobState=COMPLETING Restarts=1", 1, "completing"),
    ("JobState=RUNNING Restarts=1", 0, "running"),
    ("JobState=RUNNING PreemptTime=2026-11-24T06:41:12", 0, "preempted"),
    ("JobState=RUNNING PreemptTime=None", 0, "running"),
    ("JobState=SIGNALING PreemptTime=2026-11-24T06:41:12", 0, "preempted"),
    ("JobState=SIGNALING PreemptTime=None", 0, "running"),
    ("JobState=PREEMPTED PreemptTime=2026-11-24T06:41:12", 0, "preempted"),
    ("JobState=COMPLETED PreemptTime=2026-11-24T06:41:12", 0, "preempted"),
    ("JobState=COMPLETED PreemptTime=None", 0, "stopped"),
    ("JobState=FAILED", 0, "failed"),
    ("JobState=NODE_FAIL", 0, "node fail"),
    ("JobState=CANCELLED", 0, "cancelled"),
    ("JobState=TIMEOUT", 0, "timeout"),
    ("", 0, "stopped"),  # SLURM has forgotten it
]


@pytest.mark.parametrize(("fields", "restarts", "word"), QUEUED)
def test_what_slurm_says_of_a_job_is_one_word_of_the_table(run, fields, restarts, word):
    """The same words from a real SLURM are in cluster/test_states.py."""
    program = Path(os.environ["PATH"]) / "scontrol"
    program.parent.mkdir()
    said = f"JobId=7 JobName=x {fields} NodeList=node[1-2]" if fields else ""
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    rundir.record(run, World(), ["here"], CPU)
    job = {"slurm_job_id": "7", "slurm_restarts": restarts}
    (run / "job.json").write_text(json.dumps(rundir.job(run) | job))
    assert jobs.row_of(run)["state"] == word


def test_an_element_of_an_array_is_not_called_by_the_number_of_the_array(run, monkeypatch):
    """One element has the array's number: cancelling that run would have cancelled all of them."""
    for name, value in ARRAY.items():
        monkeypatch.setenv(name, value)
    rundir.record(run, World(), ["here"], CPU)
    assert rundir.job(run)["slurm_job_id"] == "1_99"


def programs(**said: str) -> None:
    """Programs on the path that print what SLURM's would, and note their arguments."""
    folder = Path(os.environ["PATH"].split(":")[0])
    folder.mkdir(exist_ok=True)
    for name, text in said.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\necho \"$@\" >> {folder}/{name}.called\ncat <<'E'\n{text}\nE\n")
        path.chmod(0o755)


def test_a_waiting_element_of_an_array_is_cancelled_by_the_name_it_is_shown_by(
    run, monkeypatch, capsys
):
    """`cancel 2_2`: "must be a run directory"."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/bin:/bin")
    show = "JobId=3 ArrayJobId=2 ArrayTaskId=2 JobName=sweep JobState=PENDING Reason=Resources"
    programs(squeue="2_2|PENDING||Resources|sweep", scontrol=show, scancel="")
    row = jobs.table(run.parent)[-1]
    assert (row["job"], row["state"]) == ("2_2", "waiting")
    assert jobs.cancel([row["job"]]) == 0
    assert "2_2: SLURM job 2_2 cancelled" in capsys.readouterr().out
    called = Path(os.environ["PATH"].split(":")[0]) / "scancel.called"
    assert called.read_text() == "2_2\n"


def test_a_job_that_died_at_its_start_is_in_the_table_with_its_reason(run, monkeypatch, capsys):
    """It had written neither config.yaml nor job.json, so it was not there; why it had died was
    in slurm-N.out alone."""
    output = run.parent / "slurm-9.out"
    output.write_text("error: k must be >= 1\nsrun: error: node1: task 0: Exited with code 2\n")
    dead = run.parent / "dead"
    dead.mkdir()
    submitted = {"slurm_job_id": "9", "output": str(output)}
    (dead / "submitted.json").write_text(json.dumps(submitted))
    row = jobs.row_of(dead)  # SLURM has forgotten it
    assert dead in jobs.runs_in(run.parent)
    assert (row["job"], row["state"], row["step"]) == ("9", "stopped", "0/?")
    assert row["reason"] == "error: k must be >= 1"
    assert jobs.show_log([str(dead), "--lines", "1"]) == 0
    assert "task 0" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="lines must be >= 1"):
        jobs.show_log([str(dead), "--lines", "0"])

    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/bin:/bin")  # before it had a directory
    show = f"JobId=10 JobName=x JobState=FAILED Reason=NonZeroExitCode StdOut={output}"
    programs(squeue="10|FAILED||NonZeroExitCode|x", scontrol=show)
    row = next(row for row in jobs.table(run.parent) if row["job"] == "10")
    assert (row["state"], row["reason"]) == ("failed", "error: k must be >= 1")


TORCHRUN = """\
============================================================
run.py FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-29_14:20:03
  host      : node1
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 1234)
  error_file: <N/A>
  traceback : {trace}
============================================================
"""


@pytest.mark.parametrize(("code", "trace", "reason"), [
    (-9, "Signal 9 (SIGKILL) received by PID 1234", "rank 1 on node1: ended by SIGKILL"),
    (1, "To enable traceback see: https://pytorch.org/", "rank 1 on node1: exit code 1"),
])  # fmt: skip
def test_a_rank_that_was_killed_under_torchrun_is_the_reason(run, code, trace, reason):
    """The reason was `error_file: <N/A>`."""
    output = run.parent / "output.txt"
    output.write_text(TORCHRUN.format(code=code, trace=trace))
    dead = run.parent / "dead"
    dead.mkdir()
    submitted = {"slurm_job_id": None, "output": str(output)}
    (dead / "submitted.json").write_text(json.dumps(submitted))
    assert jobs.row_of(dead)["reason"] == reason
    output.write_text("error: k must be >= 1\n" + TORCHRUN.format(code=code, trace=trace))
    assert jobs.row_of(dead)["reason"] == "error: k must be >= 1"


def test_slurms_fields_may_have_spaces(run, monkeypatch):
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/bin:/bin")
    show = "JobId=3 JobName=our run JobState=RUNNING Reason=None CPUs/Task=2 StdOut=/our runs/o.txt"
    programs(scontrol=show)
    found = jobs.slurm_job("3")
    assert (found.name, found.state, found.output) == ("our run", "RUNNING", "/our runs/o.txt")


def test_a_requeued_job_without_a_checkpoint_begins_again_in_its_own_folder(run, monkeypatch):
    """A node was lost before the first checkpoint. The restart renamed the folder, and point.json
    with it, so that the sweep no longer knew its run; and two folders had the same job."""
    shutil.rmtree(run / "checkpoints")
    (run / "point.json").write_text("{}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    rundir.prepare(run, resume_step=None)  # the older run is none of this job's
    rundir.release(run)
    assert (run.parent / "a.1" / "config.yaml").exists()
    assert (run / "point.json").exists() and not (run / "config.yaml").exists()
    (run / "config.yaml").write_text("steps: 10\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert rundir.prepare(run, resume_step=None) == []
    rundir.release(run)
    assert (run / "point.json").exists() and not (run.parent / "a.2").exists()
    rundir.prepare(run, resume_step=None)  # a second run of the same start is another run
    rundir.release(run)
    assert (run.parent / "a.2").exists() and (run / "point.json").exists()


def test_no_such_folder_or_run_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="needs a folder of runs"):
        jobs.show_jobs([str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="must be a run directory"):
        jobs.show_log([str(tmp_path)])


@pytest.mark.parametrize(
    ("script", "env", "words"),
    [
        ("slurm.sbatch", {}, "this is submitted: sbatch --nodes 8"),
        ("slurm.sbatch", {"SLURM_JOB_ID": "1"}, "of the project, got /home/a/copy.sh; inside"),
        ("slurm.sbatch", ARRAY | {"SWEEP": "no/such/file"}, "SWEEP must name a file"),
        ("slurm.sbatch", ARRAY | {"SWEEP": "cluster/hostfile.example"}, "must have a line 99"),
        ("slurm.sbatch", FIRST | {"SWEEP": "TMP/blank"}, "must have a line 1 "),
        ("slurm.sbatch", FIRST | {"SWEEP": "TMP/quote"}, "each quote closed, got --k 3 --out 'a b"),
        ("mpi.sh", {"HOSTFILE": ""}, "HOSTFILE must name a file"),
        (
            "mpi.sh",
            {"HOSTFILE": "cluster/hostfile.example", "RANKS": "0"},
            "RANKS must be a whole number from 1",
        ),
        ("mpi.sh", {"HOSTFILE": "cluster/hostfile.example", "RANKS": "99"}, "<= the 16 slots"),
        ("mpi.sh", {"HOSTFILE": "cluster/hostfile.example"}, "no answer from node1 node2; try ssh"),
        ("deepspeed.sh", {"HOSTFILE": "no/such/file"}, "HOSTFILE must name a file"),
        ("deepspeed.sh", {"HOSTFILE": "TMP/odd"}, "must be like 'node1 slots=8'"),
        ("deepspeed.sh", {"HOSTFILE": "cluster/hostfile.example"}, "no answer from node1 node2"),
        ("deepspeed.sh", {"NODES": "8"}, "NODES=8 needs HOSTFILE"),
        ("deepspeed.sh", {"NODES": "two"}, "NODES must be a whole number from 1"),
        ("deepspeed.sh", {"HOSTFILE": "cluster/hostfile.example", "NODES": "8"}, "<= the 2 mach"),
        ("torchrun.sh", {"NODES": "8"}, "NODES=8 needs MASTER_ADDR"),
        ("torchrun.sh", {"RANKS": "-1"}, "RANKS must be a whole number from 1"),
        ("torchrun.sh", {"MASTER_ADDR": "node1"}, "MASTER_ADDR=node1 needs NODES"),
        ("torchrun.sh", {"NODES": "8", "MASTER_ADDR": "no.such.host"}, "which is unknown here"),
        ("torchrun.sh", {"NODES": "8", "SLURM_STEP_NUM_NODES": "2"}, "NODES must be the 2 nodes"),
        ("torchrun.sh", UNREACHABLE, "must answer within 1 s, got nothing from 192.0.2.1:29500"),
    ],
)
def test_a_launch_script_says_what_is_missing_in_one_sentence(script, env, words, tmp_path):
    for name in ("mpirun", "pdsh", "scontrol", "ssh"):  # not to depend on what this machine has
        (tmp_path / name).write_text("#!/bin/sh\nexit 99\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho JobId=1 Command=/home/a/copy.sh StdOut=o\n")
    (tmp_path / "odd").write_text("node1 slots=all\n")
    (tmp_path / "blank").write_text(" \n")
    (tmp_path / "quote").write_text("--k 3 --out 'a b\n")
    env = {name: value.replace("TMP", str(tmp_path)) for name, value in env.items()}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "NODES"))}
    done = subprocess.run(
        ["bash", f"launch/{script}"],
        cwd=ROOT,
        env=kept | {"PATH": f"{tmp_path}:/usr/bin:/bin"} | env,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_logs_of_a_run_without_slurm_are_those_of_its_directory(run, capsys):
    with pytest.raises(ConfigError, match=r"a SLURM job or .*log\.txt, got neither"):
        jobs.show_log([str(run)])
    (run / "log.txt").write_text("one\ntwo\nthree\n")
    assert jobs.show_log([str(run), "--lines", "2"]) == 0
    assert capsys.readouterr().out == "two\nthree\n"


def test_the_log_says_what_ended_the_run_but_not_why_another_may_not_begin(run):
    (run / "log.txt").write_text("step 1/10\n")
    for error, rank in (
        (RunError("lost rank 1"), 0),
        (RunError("not me"), 1),
        (ConfigError("x"), 0),
    ):
        with pytest.raises(type(error)), rundir.log_failure(run, rank):
            raise error
    first, second = (run / "log.txt").read_text().splitlines()
    assert first == "step 1/10" and second.endswith(" error: lost rank 1")
