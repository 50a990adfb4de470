"""Signals, disks that refuse, settings that contradict: the program as a user sees it."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_looksam import cli, fit
from dist_looksam.checkpoint import Reader, found

ARGUMENTS = "--data digits --model vit_8 --steps 6 --batch_size 16 --k 3 --workers 0 --device cpu "
ARGUMENTS += "--eval_every 100 --backend plain"


def train(out: Path, *more: object) -> int:
    return fit.main([*ARGUMENTS.split(), "--out", str(out), *map(str, more)])


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, do): do() while step n is trained."""

    def plan(step, do):
        real = fit.Fit._step

        def step_(self, number):
            if number == step:
                do()
            real(self, number)

        monkeypatch.setattr(fit.Fit, "_step", step_)

    return plan


def rows(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "images_per_s")
    return [{k: v for k, v in json.loads(x).items() if k not in times} for x in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out) == 0
    return out


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_saves_once_and_leaves_with_0_and_the_run_goes_on(
    tmp_path, at_step, monkeypatch, capsys, whole, name
):
    out = tmp_path / "run"
    before = signal.getsignal(getattr(signal, name))
    at_step(1, lambda: os.kill(os.getpid(), getattr(signal, name)))
    assert train(out) == 0
    assert f"{name} after step 2" in capsys.readouterr().out
    assert [p.name for p in found(out / "checkpoints")] == ["step-3"]
    assert not (out / "summary.json").exists()
    assert signal.getsignal(getattr(signal, name)) == before
    monkeypatch.undo()
    assert train(out, "--resume", "auto") == 0
    assert rows(out) == rows(whole)
    a, b = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(a[n], b[n]) for n in b)


@pytest.mark.parametrize("job, flag, number, asked", [
    ("77", "--requeue", signal.SIGUSR1, True),
    ("77", "--no_requeue", signal.SIGUSR1, False),
    ("77", "--requeue", signal.SIGTERM, False),  # SLURM itself requeues what it pre-empts
    (None, "--requeue", signal.SIGUSR1, False),
])  # fmt: skip
def test_a_slurm_job_queues_itself_again_if_asked(
    tmp_path, at_step, monkeypatch, job, flag, number, asked
):
    called = tmp_path / "called"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {called}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_NTASKS", "1")
    at_step(0, lambda: os.kill(os.getpid(), number))
    assert train(tmp_path / "run", flag) == 0
    assert called.exists() == asked
    if asked:
        assert called.read_text().split() == ["requeue", "77"]


@pytest.mark.parametrize("changed, says", [
    (("--optimizer", "sam"), "optimizer must be as in the checkpoint"),
    (("--batch_size", "32"), "batch_size must be as in the checkpoint"),
    (("--seed", "1"), "seed must be as in the checkpoint"),
    (("--model", "vit_28"), "model"),
    (("--steps", "3"), "steps must be more than the checkpoint's 6"),
])  # fmt: skip
def test_settings_that_contradict_the_checkpoint_are_a_sentence(whole, capsys, changed, says):
    assert train(whole, "--resume", "auto", *changed) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_full_disk_stops_with_a_sentence_and_the_older_checkpoint_is_whole(
    tmp_path, monkeypatch, capsys
):
    from dist_looksam.checkpoint import writer

    real, calls = writer.write_tensors, []

    def full(path, tensors):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, tensors)

    monkeypatch.setattr(writer, "write_tensors", full)
    assert train(tmp_path / "run", "--save_every", 2) == 1
    error = capsys.readouterr().err
    assert "step-4 was not written: No space left on device" in error and error.count("\n") == 1
    assert "step-2" in error
    Reader(tmp_path / "run" / "checkpoints" / "step-2").verify()


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root only")
@pytest.mark.parametrize("options, says", [
    ("size=1500k", "No space left on device"), ("ro", "Read-only file system"),
])  # fmt: skip
def test_a_real_small_or_read_only_disk_is_a_sentence(tmp_path, capsys, options, says):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mount is not allowed here")
    try:
        code = train(disk / "run", "--save_every", 2)
        error = capsys.readouterr().err
        assert code in (1, 2) and says in error and error.count("\n") == 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_auto_passes_a_damaged_one_over_and_refuses_if_all_are(tmp_path, capsys, whole):
    out = tmp_path / "run"
    assert train(out, "--save_every", 2) == 0
    for step in (6, 4):
        part = out / "checkpoints" / f"step-{step}" / "rank-00000.safetensors"
        part.write_bytes(part.read_bytes()[:-1])
    capsys.readouterr()
    assert train(out, "--save_every", 2, "--resume", "auto") == 0
    told = capsys.readouterr().out
    assert "step-6" in told and "cut short" in told and "at step 2" in told
    assert rows(out) == rows(whole)
    for path in found(out / "checkpoints"):
        (path / "manifest.json").write_text("{}")
    assert train(out, "--resume", "auto") == 1
    assert "start anew with --resume none" in capsys.readouterr().err
    assert rows(out) == rows(whole)  # nothing was moved or emptied


def test_the_commands_list_verify_and_export(whole, tmp_path, capsys):
    assert cli.main(["checkpoint", "ls", str(whole)]) == 0
    assert "step-6" in capsys.readouterr().out
    assert cli.main(["checkpoint", "verify", str(whole)]) == 0
    target = tmp_path / "weights.safetensors"
    assert cli.main(["checkpoint", "export", str(whole), str(target)]) == 0
    want, got = load_file(whole / "model.safetensors"), load_file(target)
    assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)
    assert cli.main(["checkpoint", "ls", str(tmp_path)]) == 2
    assert cli.main(["checkpoint", "export", str(whole), "/no/where/x"]) == 2
    part = whole / "checkpoints" / "step-6" / "rank-00000.safetensors"
    raw = part.read_bytes()
    part.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    try:
        assert cli.main(["checkpoint", "verify", str(whole)]) == 1
        assert "checksum differs" in capsys.readouterr().out
    finally:
        part.write_bytes(raw)


def test_nothing_of_the_package_unpickles():
    """torch.load without weights_only runs what a file says."""
    source = "".join(p.read_text() for p in Path(fit.__file__).parent.rglob("*.py"))
    assert "torch.load(" not in source and "pickle.load" not in source
    assert "dist_looksam" in sys.modules
