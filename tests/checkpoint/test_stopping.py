"""Signals, disks that refuse, settings that contradict: the program as a user sees it."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from testbed import until

from dist_looksam import models
from dist_looksam.checkpoint import Reader, form, found
from dist_looksam.cli import main as cli
from dist_looksam.record import metrics
from dist_looksam.run import fit
from dist_looksam.run.train import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ARGUMENTS = "--data digits --model vit_8 --steps 6 --batch_size 16 --k 3 --workers 0 --device cpu "
ARGUMENTS += "--eval_every 100 --backend plain"


def train(out: Path, *more: object) -> int:
    return main([*ARGUMENTS.split(), "--out", str(out), *map(str, more)])


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
    assert f"{name} after step 3: saved step-3" in capsys.readouterr().out
    assert [p.name for p in found(out / "checkpoints")] == ["step-3"]
    assert not (out / "summary.json").exists()
    assert signal.getsignal(getattr(signal, name)) == before
    monkeypatch.undo()
    assert train(out, "--resume", "auto") == 0
    assert rows(out) == rows(whole)
    a, b = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(a[n], b[n]) for n in b)


def test_ctrl_c_saves_and_leaves_with_130_and_one_line(tmp_path, at_step, capsys, monkeypatch):
    """It ended in a traceback, and what was trained since the last checkpoint was lost."""
    out = tmp_path / "run"
    at_step(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert train(out) == 130
    told = capsys.readouterr()
    assert "SIGINT after step 3: saved step-3; --resume auto goes on" in told.out
    assert told.err == "" and found(out / "checkpoints")
    monkeypatch.undo()

    def early(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("dist_looksam.settings.assemble.load", early)
    assert train(out) == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was trained\n"


WAITS = """
import time
from dist_looksam.run.interrupt import Interrupt
with Interrupt():
    print("ready", flush=True)
    while True:
        time.sleep(60)
"""


def test_a_second_ctrl_c_ends_at_once_but_not_what_a_launcher_passes_on():
    """mpirun's ranks get a terminal's Ctrl-C, and then mpirun's own."""
    command = [sys.executable, "-c", WAITS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.1)
            time.sleep(1.1)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=10) == 130
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_a_run_that_learns_nothing_says_so_and_exits_with_1(tmp_path, capsys, monkeypatch):
    """It skipped 59 of its 60 steps, said nothing, showed the last finite loss, and left with 0."""
    monkeypatch.setitem(metrics.MetricsLog.__init__.__kwdefaults__, "every", 4)
    out = tmp_path / "run"
    assert train(out, "--optimizer", "adamw", "--lr", "1e9", "--steps", "30") == 1
    told = capsys.readouterr()
    assert "nothing was learnt after step" in told.err and told.err.count("\n") == 1
    assert "warning: the last 2" in told.out and "loss nan" in told.out
    assert json.loads((out / "summary.json").read_text())["steps"] == 30
    assert "nothing was learnt" in (out / "log.txt").read_text().splitlines()[-1]

    out = tmp_path / "short"
    flags = ("--optimizer", "adamw", "--lr", "1e9", "--steps", "30", "--max_skips", "6")
    assert train(out, *flags) == 1
    assert json.loads((out / "summary.json").read_text())["steps"] < 20
    assert found(out / "checkpoints") == []

    # Fewer than 20 skips, but the weights give no finite loss: it left with 0.
    assert train(tmp_path / "few", "--optimizer", "adamw", "--lr", "1e9", "--steps", "8") == 1
    assert "nothing was learnt after step" in capsys.readouterr().err


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
    (("--train_images", "300"), "got 300 instead of None; leave --train_images out"),
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


@pytest.fixture
def disk(tmp_path):
    """A real disk of its own, as small as `disk.mount(options)` makes it."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        subprocess.run(command, check=True)
        return path

    yield mount
    subprocess.run(["umount", "-l", str(path)], check=False)


@pytest.mark.needs("root")  # mounts a small disk
def test_a_real_disk_that_fills_up_is_a_sentence_and_with_more_room_the_run_goes_on(
    disk, capsys, whole
):
    out = disk("size=8m") / "run"  # a checkpoint takes 2.4 MB
    assert train(out, "--save_every", 1) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1
    older = found(out / "checkpoints")
    assert older and all(Reader(path).verify() is None for path in older)
    disk("remount,size=64m")
    assert train(out, "--save_every", 1, "--resume", "auto") == 0
    assert f"at step {older[0].name[5:]}" in capsys.readouterr().out
    assert rows(out) == rows(whole)


@pytest.mark.needs("root")  # mounts a small disk
def test_a_disk_that_turns_read_only_is_a_sentence_and_what_was_saved_is_whole(
    disk, at_step, capsys
):
    out = disk("size=64m") / "run"
    folder = str(out / "checkpoints")

    def turn() -> None:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        read_only = ["mount", "-o", "remount,ro,bind", folder]
        until(lambda: subprocess.run(read_only).returncode == 0, 30)  # busy while step-2 is written

    at_step(4, turn)
    assert train(out, "--save_every", 2) == 1
    error = capsys.readouterr().err
    assert "Read-only file system" in error and error.count("\n") == 1
    older = found(out / "checkpoints")
    assert older and all(Reader(path).verify() is None for path in older)


def _without_gv(path: Path) -> None:
    """A whole checkpoint, but that nobody has kept a g_v in it."""
    part = path / "rank-00000.safetensors"
    kept = {k: v.clone() for k, v in load_file(part).items() if not k.startswith("g_v/")}
    content = form.read_json(path / form.MANIFEST)
    row = content["parts"][0]
    row["sha256"], row["bytes"] = form.write_tensors(part, kept)
    row["pieces"] = [piece for piece in row["pieces"] if piece[1] != "g_v"]
    content["counters"]["keys"].remove("g_v")
    form.write_json(path / form.MANIFEST, content)


def test_a_resume_without_gv_looks_on_its_first_step_and_says_so(tmp_path, at_step, capsys):
    out = tmp_path / "run"
    method = ("--optimizer", "look_sam")
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(out, *method) == 0
    _without_gv(out / "checkpoints" / "step-4")
    capsys.readouterr()
    at_step(99, lambda: None)
    assert train(out, *method, "--resume", "auto") == 0
    assert "the checkpoint holds no g_v: the first step looks" in capsys.readouterr().out
    assert [row["look"] for row in rows(out) if "look" in row] == [
        True,
        False,
        False,
        True,
        True,
        False,
    ]


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
    assert target.read_bytes() == (whole / "model.safetensors").read_bytes()  # metadata, too
    told = capsys.readouterr().out
    assert "grey, the middle square at 8x8, scaled to 0..1, mean 0.3053, std 0.3757" in told
    assert "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in told
    with safe_open(target, "pt") as file:
        about = file.metadata()
    assert about["class_names"] == json.dumps([str(digit) for digit in range(10)])
    assert about["model"] == "vit_8" and about["crop"] == "1.0" and about["format"] == "pt"
    assert cli.main(["checkpoint", "ls", str(tmp_path)]) == 2
    assert cli.main(["checkpoint", "export", str(whole), "/no/where/x"]) == 2
    assert cli.main(["checkpoint", "export", str(whole), str(tmp_path / "x.pth")]) == 2
    assert not (tmp_path / "x.pth").exists()  # torch.load cannot read safetensors
    part = whole / "checkpoints" / "step-6" / "rank-00000.safetensors"
    raw = part.read_bytes()
    part.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    try:
        assert cli.main(["checkpoint", "verify", str(whole)]) == 1
        assert "checksum differs" in capsys.readouterr().out
    finally:
        part.write_bytes(raw)


def test_an_export_for_timm_has_its_names_and_its_patches_are_a_convolution(
    whole, tmp_path, capsys
):
    target = tmp_path / "timm.safetensors"
    assert cli.main(["checkpoint", "export", str(whole), str(target), "--timm"]) == 0
    assert "VisionTransformer(img_size=8, patch_size=2, in_chans=1" in capsys.readouterr().out
    got, own = load_file(target), load_file(whole / "model.safetensors")
    assert {"patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.bias"} <= {
        *got
    }
    assert len(got) == len(own) and not {n for n in got if n not in own} & set(own)
    model = models.create("vit_8", num_classes=10, image_shape=(1, 8, 8))
    model.load_state_dict(own)
    images = torch.randn(2, 1, 8, 8)
    ours = model.patch_embed(model._patches(images))
    kernel, bias = got["patch_embed.proj.weight"], got["patch_embed.proj.bias"]
    theirs = torch.nn.functional.conv2d(images, kernel, bias, stride=2).flatten(2).transpose(1, 2)
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.needs("timm")
def test_timm_computes_the_same_with_an_export(whole, tmp_path, capsys):
    import timm

    target = tmp_path / "timm.safetensors"
    assert cli.main(["checkpoint", "export", str(whole), str(target), "--timm"]) == 0
    call = capsys.readouterr().out.split("They fit ")[1]
    theirs = eval(call, {"timm": timm}).eval()
    theirs.load_state_dict(load_file(target))
    ours = models.create("vit_8", num_classes=10, image_shape=(1, 8, 8)).eval()
    ours.load_state_dict(load_file(whole / "model.safetensors"))
    images = torch.randn(2, 1, 8, 8)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


def test_nothing_of_the_package_unpickles():
    """torch.load without weights_only runs what a file says."""
    source = "".join(p.read_text() for p in Path(fit.__file__).parents[1].rglob("*.py"))
    loads = re.findall(r"torch\.load\(.*", source)
    assert all("weights_only=True" in line for line in loads) and "pickle.load" not in source
    assert "dist_looksam" in sys.modules
