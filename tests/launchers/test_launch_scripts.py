"""What the launch scripts start and do afterwards; programs that note their arguments stand for
SLURM's and MPI's. With real ones: tests/cluster/."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
TOOK = "2030-01-01T00:00:00"
FIELDS = f"JobId=1 JobState=RUNNING Requeue=1 PreemptTime={TOOK} Command={SCRIPT} StdOut=o"


def call(script: str, folder: Path, programs: dict[str, str], *flags: str, **env: str):
    """The script, finished, with `programs` (name: lines of shell) ahead of this machine's."""
    for name, lines in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "NODES"))}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *flags, "--steps", "5"],
        cwd=folder,
        env=kept | {"PATH": f"{folder}:/usr/bin:/bin"} | env,
        capture_output=True,
        text=True,
        timeout=30,
    )


def job(folder: Path, srun: str, *, took: str = "None", state: str = "RUNNING", again: str = "1",
        **env: str):  # fmt: skip
    """slurm.sbatch in a job whose `srun` is these lines, and what `scontrol` was told to requeue.

    took: PreemptTime; again: Requeue.
    """
    fields = f"JobId=1 JobState={state} Requeue={again} PreemptTime={took} Command={SCRIPT}"
    scontrol = f'[[ $1 == requeue ]] && echo "$2" >>requeued || echo "{fields} StdOut=o"'
    programs = {"srun": srun, "scontrol": scontrol}
    done = call("slurm.sbatch", folder, programs, SLURM_JOB_ID="1", **env)
    told = folder / "requeued"
    return done, told.read_text().split() if told.exists() else []


@pytest.mark.parametrize(("code", "how", "requeued"), [
    (0, {"took": TOOK}, True),
    (143, {"took": TOOK}, True),
    (143, {}, False),  # somebody ended the ranks
    (143, {"took": TOOK, "state": "SIGNALING"}, True),  # SIGTERM is still on its way to a node
    (143, {"took": TOOK, "state": "CANCELLED"}, False),
    (143, {"took": TOOK, "again": "0"}, False),  # sbatch --no-requeue
    (1, {"took": TOOK}, True),  # what a starting rank had called, or waits for, is gone
    (1, {}, False),
    (2, {"took": TOOK}, False),
    (0, {}, False),
])  # fmt: skip
def test_a_pre_empted_job_is_requeued_also_while_its_ranks_start(code, how, requeued, tmp_path):
    """A rank that imports, reads data or builds its model does not catch SIGTERM yet. It ended with
    143, and the job was over instead of back in the queue."""
    end = "kill -TERM $$" if code == 143 else f"exit {code}"
    done, told = job(tmp_path, end, **how)
    assert done.returncode == code, done.stderr
    assert told == ["1"] * requeued
    assert ("back into the queue" in done.stdout) == requeued


@pytest.mark.parametrize(("restarts", "how", "requeued"), [
    (0, {}, True),
    (1, {}, False),  # of another start
    (0, {"state": "SIGNALING"}, True),
    (0, {"state": "CANCELLED"}, False),
    (0, {"again": "0"}, False),
])  # fmt: skip
def test_ranks_that_trained_and_left_unfinished_go_back(restarts, how, requeued, tmp_path):
    """Whoever sent the signal; but not `--help` and `--dry_run`, which write no job.json."""
    began = f'{{"slurm_job_id": "1", "slurm_restarts": {restarts}}}'
    lines = f"mkdir -p runs/slurm-1; echo '{began}' >runs/slurm-1/job.json"
    done, told = job(tmp_path, lines, **how)
    assert done.returncode == 0 and told == ["1"] * requeued


def test_a_job_that_had_finished_is_not_requeued(tmp_path):
    lines = "cd runs/slurm-1; rm submitted.json; touch summary.json; exit 143"
    assert job(tmp_path, lines, took=TOOK)[1] == []


def test_a_finished_run_that_goes_on_is_requeued_if_pre_empted_before_it_trains(tmp_path):
    """The summary of its former end was taken for that of this start."""
    (tmp_path / "runs" / "slurm-1").mkdir(parents=True)
    (tmp_path / "runs" / "slurm-1" / "summary.json").touch()
    assert job(tmp_path, "exit 143", took=TOOK)[1] == ["1"]


@pytest.mark.parametrize("silent", [1, 2, 3, 4])  # show, show, show, requeue
def test_a_controller_that_restarts_is_asked_again(silent, tmp_path):
    """One call that it did not answer: a job in its time limit was over, with exit code 0, and one
    that began was refused as of a script that is not the project's."""
    counted = (
        f'echo x >>calls; [[ $(wc -l <calls) != {silent} ]] || {{ echo "slurm_load_jobs error: '
    )
    counted += 'Unable to contact slurm controller (connect failure)" >&2; exit 1; }'
    lines = f'{counted}; case $1 in requeue) echo "$2" >>requeued ;; *) echo "{FIELDS}" ;; esac'
    programs = {"srun": "exit 143", "scontrol": lines}
    done = call("slurm.sbatch", tmp_path, programs, SLURM_JOB_ID="1")
    assert done.returncode == 143 and (tmp_path / "requeued").read_text() == "1\n", done.stderr
    assert len((tmp_path / "calls").read_text().split()) == 5


def test_a_job_that_may_no_more_be_requeued_ends_at_once(tmp_path):
    """`scontrol update requeue=0`, said while it ran."""
    lines = (
        f'echo x >>calls; shown="{FIELDS}"; [[ $(wc -l <calls) == 1 ]] || shown=${{shown/Requeue=1/'
    )
    lines += 'Requeue=0}; [[ $1 == requeue ]] && touch requeued || echo "$shown"'
    done = call("slurm.sbatch", tmp_path, {"srun": "exit 143", "scontrol": lines}, SLURM_JOB_ID="1")
    assert done.returncode == 143 and not (tmp_path / "requeued").exists()


def test_a_job_that_slurm_does_not_know_is_named(tmp_path):
    lines = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"
    done = call("slurm.sbatch", tmp_path, {"scontrol": lines}, SLURM_JOB_ID="9")
    assert done.returncode == 1
    assert done.stderr == (
        "slurm.sbatch: scontrol -o show job 9 has failed: "
        "slurm_load_jobs error: Invalid job id specified\n"
    )


def test_a_project_and_an_output_may_have_spaces(tmp_path):
    launch = tmp_path / "our project" / "launch"
    launch.mkdir(parents=True)
    (launch / "rank.sh").touch()
    shown = (
        f"JobId=1 Requeue=1 Command={launch}/slurm.sbatch --k 5 WorkDir=/a b StdOut=/a b/o 1.txt"
    )
    programs = {
        "srun": 'printf "<%s>\n" "$@"; echo "$LOOKSAM_OUTPUT"',
        "scontrol": f"echo '{shown}'",
    }
    done = call("slurm.sbatch", tmp_path, programs, SLURM_JOB_ID="1")
    assert f"<{launch}/rank.sh>" in done.stdout.splitlines(), done.stderr
    assert done.stdout.endswith("\n/a b/o 1.txt\n")


@pytest.mark.parametrize(("env", "cores"), [
    ({}, ""), ({"SLURM_CPUS_PER_TASK": "12"}, "12"),
    ({"SLURM_CPUS_PER_TASK": "12", "SRUN_CPUS_PER_TASK": "6"}, "6"),
])  # fmt: skip
def test_the_cores_of_a_task_reach_srun(env, cores, tmp_path):
    """From SLURM 22.05 on srun does not take sbatch's --cpus-per-task: a rank may get one core."""
    done, _ = job(tmp_path, 'echo "cores <${SRUN_CPUS_PER_TASK:-}>"', **env)
    assert f"cores <{cores}>" in done.stdout


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_m_is_written_so_that_the_launcher_leaves_it(script, tmp_path):
    """`submit` passed all its checks, and the launcher ended: --m could match --max-restarts."""
    program = {"bin/python": 'printf "<%s>" "$@"'}
    (tmp_path / "bin").mkdir()
    env = {"PYTHON": f"{tmp_path}/bin/python"}
    done = call(script, tmp_path, program, "--m", "32", "--model", "m", "--m=16", **env)
    words = "train.py><--group><32><--model><m><--group=16><--steps><5>"
    assert done.returncode == 0 and done.stdout.endswith(words)
    program = {"bin/horovodrun": 'printf "<%s>" "$@"'}
    done = call("horovod.sh", tmp_path, program, "-np", "2", "--", "--m", "32", **env)
    assert done.stdout.endswith("rank.sh><--backend><horovod><--group><32><--steps><5>")


def test_torchrun_runs_in_the_container_and_deepspeeds_launcher_says_that_it_cannot(tmp_path):
    """Both trained on the host, without a word."""
    programs = {"apptainer": 'printf "<%s>" "$@"'}
    done = call("torchrun.sh", tmp_path, programs, CONTAINER="x.sif")
    python = "/opt/dist_looksam/.venv/bin/python"
    assert f"<x.sif><{python}><-m><torch.distributed.run>" in done.stdout, done.stderr
    for env in ({"CONTAINER": "x"}, {"SITE": "x", "HOSTFILE": "hosts"}):
        done = call("deepspeed.sh", tmp_path, {}, **env)
        assert done.returncode == 2 and "DeepSpeed's launcher, got x; unset it" in done.stderr
    done = call("deepspeed.sh", tmp_path, {"python": "true"}, SITE="x", PYTHON=f"{tmp_path}/python")
    assert done.returncode == 0


@pytest.mark.parametrize("line", ["node2", "node2 max_slots=8 slots=8"])
def test_deepspeeds_hostfile_needs_slots_first(line, tmp_path):
    """A traceback of DeepSpeed's: bad entry."""
    (tmp_path / "hosts").write_text(f"node1 slots=8\n{line}\n")
    done = call("deepspeed.sh", tmp_path, {"pdsh": "true"}, HOSTFILE="hosts", SSH_CHECK="no")
    assert done.returncode == 2
    assert f"slots=N behind each machine's name, got line 2: {line} in hosts" in done.stderr


def test_the_first_machines_address_is_without_the_user_of_ssh(tmp_path):
    (tmp_path / "hosts").write_text("bob@node1 slots=8\n")
    env = {"HOSTFILE": "hosts", "SSH_CHECK": "no"}
    done = call("mpi.sh", tmp_path, {"mpirun": 'echo "<$MASTER_ADDR>"'}, **env)
    assert "<node1>" in done.stdout


@pytest.mark.parametrize(("line", "words"), [
    ("--lr 1e-3  --k\t3", ["--lr", "1e-3", "--k", "3"]),
    ("""--out 'a  b' --data "it's" --model a\\ b""",
     ["--out", "a  b", "--data", "it's", "--model", "a b"]),
    ("--help %s -- %d\\\\n", ["--help", "%s", "--", "%d\\n"]),
    ("'' --resume ''", ["", "--resume", ""]),
])  # fmt: skip
def test_a_line_of_a_sweep_is_read_as_in_a_command_line(line, words, tmp_path):
    (tmp_path / "lines").write_text(f"--seed 0\n{line}\n--seed 9\n")
    element = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "2", "SWEEP": "lines"}
    done, _ = job(tmp_path, 'printf "<%s>\n" "$@"', **element)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("<5>\n")[1]  # after --steps 5
    assert said == "".join(f"<{word}>\n" for word in words)


@pytest.mark.parametrize("mpi", ["mpirun (Open MPI) 4.1.4", "HYDRA build details:"])
def test_a_hostfile_may_have_tabs(mpi, tmp_path):
    """`node1<TAB>slots=8`, as many write it, was refused as a wrong line."""
    text = "# ours\n\t\nnode1\tslots=8\n node2 \t slots=4\tmax_slots=8\n\t# node3 slots=8\nnode4\n"
    (tmp_path / "hosts").write_text(text)
    mpirun = f"""[[ $1 != --version ]] || {{ echo '{mpi}'; exit; }}; echo "$*" """
    env = {"HOSTFILE": "hosts", "SSH_CHECK": "no"}
    done = call("mpi.sh", tmp_path, {"mpirun": mpirun}, **env)
    assert done.returncode == 0, done.stderr
    assert " 13 " in done.stdout.splitlines()[0]
    if "HYDRA" in mpi:
        assert " node1:8,node2:4,node4:1 " in done.stdout


WRONG_LINES = [
    *("-oProxyCommand=touch${IFS}harm", "-oProxyCommand=touch harm slots=8", "node1;x slots=8"),
    *("node1 lots=8", "node1 Slots=8", "node1 slots = 8", "node1 slots=0", "node1 slots=8 gpus=2"),
    *("node1 slots=08", "node1:8", "node1 slots=8\r", "@node1 slots=8", "slots=8", "node1 8"),
]


@pytest.mark.parametrize("line", WRONG_LINES)
@pytest.mark.parametrize("script", ["mpi.sh", "deepspeed.sh", "horovod.sh"])
def test_a_line_of_a_hostfile_that_is_not_a_machine_and_its_slots_is_refused(
    script, line, tmp_path
):
    """A name that begins with a dash was an option of ssh and ran a command; with `lots=8` the
    machine had one slot."""
    (tmp_path / "hosts").write_text(f"node1 slots=8 # ours\n{line}\n")
    programs = {n: "touch started" for n in ("mpirun", "pdsh", "python", "horovodrun")}
    programs["ssh"] = 'touch called; case "$1 $2 $3 $4 $5" in *Proxy*) touch harm ;; esac'
    env = {"HOSTFILE": "hosts", "PYTHON": str(tmp_path / "python")}
    flags = ["--hostfile", "hosts", "--"] if script == "horovod.sh" else []
    done = call(script, tmp_path, programs, *flags, **env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "a line of hosts must be like 'node1 slots=8', got line 2: " in done.stderr
    assert not {"started", "called", "harm"} & {p.name for p in tmp_path.iterdir()}


def test_ssh_takes_no_machine_for_an_option(tmp_path):
    programs = {"mpirun": "true", "ssh": 'echo "$@" >>called'}
    (tmp_path / "hosts").write_text("user@node1 slots=8 max-slots=9\n")
    assert call("mpi.sh", tmp_path, programs, HOSTFILE="hosts").returncode == 0
    assert (tmp_path / "called").read_text().endswith(" -- user@node1 true\n")
