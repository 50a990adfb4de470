"""One tiny run of the program: what it leaves, and that an interruption does not show."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dist_looksam import checkpoint
from dist_looksam.record import metrics
from dist_looksam.record.version import made_with
from dist_looksam.run import results
from dist_looksam.run.train import main
from dist_looksam.settings import config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 20
# 64 samples a step, so that 20 steps are most of an epoch; drop-path draws on every step.
TINY = ["--data", "digits", "--optimizer", "look_sam", "--k", "5", "--batch_size", "64",
        "--micro_batch", "32", "--steps", str(STEPS), "--drop_path", "0.2", "--augment", "crop",
        "--eval_every", "8", "--save_every", "7", "--probe_every", "1"]  # fmt: skip
SUMMARY = {
    "top1", "top5", "steps", "seconds", "images_per_s", "forward_backward_passes", "world_size",
    "backend", "optimizer", "batch_size", "version", "commit", "mfu", "peak_memory",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, draw_curves):
    """The run directory of one whole run."""
    out = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_draw", draw_curves)
        assert main([*TINY, "--out", str(out)]) == 0
    return out


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_clocks(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in rows]


def test_it_leaves_every_file_of_the_run_directory(run):
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "summary.json", "model.safetensors", "checkpoints",
        "curves.png", "log.txt", "probe.jsonl",
    }  # fmt: skip
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-7", "step-14", "step-20"}
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_colleague_may_read_the_weights_as_well_as_the_settings(run):
    """The library writes weights for their owner's eyes alone."""
    modes = [(run / n).stat().st_mode for n in ("config.yaml", "model.safetensors")]
    assert modes[0] == modes[1]


def test_summary_counts_the_passes_that_were_made(run):
    """20 steps at k = 5 are 20 + 4 looks; a well-known LookSAM makes 40."""
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == SUMMARY
    assert summary["forward_backward_passes"] == 24
    assert summary["steps"] == STEPS and summary["batch_size"] == 64
    assert summary["world_size"] == 1 and summary["backend"] == "plain"
    assert summary["optimizer"] == "look_sam"
    assert 0 < summary["top1"] <= 1
    assert summary["seconds"] > 0
    assert summary["images_per_s"] == pytest.approx(STEPS * 64 / summary["seconds"], rel=1e-3)


def test_a_run_says_what_it_was_made_with(run, tmp_path, monkeypatch):
    """Nothing told of which commit a run was; the report named its own."""
    mine = made_with()
    kept = [json.loads((run / name).read_text()) for name in ("summary.json", "job.json")]
    assert all(k[name] == mine[name] for k in kept for name in ("version", "commit"))
    job = kept[1]
    assert (job["torch"], job["threads"]) == (torch.__version__, torch.get_num_threads())
    assert job["device"] in Path("/proc/cpuinfo").read_text() or job["device"] == os.uname().machine
    first = (run / "config.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# dist_looksam version {mine['version']}")
    assert made_with(tmp_path)["commit"] is None  # no checkout
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    (tmp_path / "file").write_text("a")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    clean = made_with(tmp_path)["commit"]
    assert clean is not None and len(clean) == 40
    (tmp_path / "file").write_text("b")
    assert made_with(tmp_path)["commit"] == f"{clean}-dirty"
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("dist_looksam.record.version._PATIENCE", 0.1)
    assert made_with(tmp_path)["commit"] is None


def test_a_step_formats_no_stack_of_calls(tmp_path, monkeypatch, draw_curves):
    formats = []
    real = traceback.format_stack

    def counted(*args, **kwargs):
        formats.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(traceback, "format_stack", counted)
    monkeypatch.setattr(results, "_draw", draw_curves)
    seen = []
    for steps in (2, 12):
        formats.clear()
        flags = [*TINY, "--save_every", "0", "--eval_every", "100", "--steps", str(steps)]
        assert main([*flags, "--out", str(tmp_path / str(steps))]) == 0
        seen.append(len(formats))
    assert seen[0] == seen[1]


def test_metrics_have_one_line_a_step_with_every_field(run):
    rows = lines(run / "metrics.jsonl")
    steps = [r for r in rows if "eval_top1" not in r]
    assert [r["step"] for r in steps] == list(range(STEPS))
    assert all(tuple(r) == metrics.FIELDS for r in steps)
    assert [r["step"] for r in steps if r["look"]] == [0, 5, 10, 15]
    assert not any(r["skipped"] for r in steps)
    for row in steps:
        assert row["gv_norm"] > 0
        assert row["gv_ratio"] == pytest.approx(row["gv_norm"] / row["grad_norm"], rel=1e-5)
        assert row["epoch"] == pytest.approx(row["step"] * 64 / 1437, rel=1e-6)
    assert math.log(10) - 0.5 < steps[0]["loss"] < math.log(10) + 0.5
    taken = sum(64 / row["images_per_s"] for row in steps)
    assert taken == pytest.approx(steps[-1]["seconds"], abs=2e-3)  # no moment is in no step
    assert steps[-1]["seconds"] <= json.loads((run / "summary.json").read_text())["seconds"]


def test_evaluations_are_where_they_were_asked_for_and_at_the_end(run):
    rows = [r for r in lines(run / "metrics.jsonl") if "eval_top1" in r]
    assert [r["step"] for r in rows] == [8, 16, 20]
    assert all(set(r) == {"step", "eval_top1", "eval_top5", "eval_loss"} for r in rows)
    top1 = json.loads((run / "summary.json").read_text())["top1"]
    assert rows[-1]["eval_top1"] == pytest.approx(top1, abs=1e-8)


def test_the_weights_are_those_of_the_last_checkpoint_by_their_names_in_the_module(run):
    weights = load_file(run / "model.safetensors")
    reader = checkpoint.Reader(run / "checkpoints" / "step-20")
    from dist_looksam import models

    model = models.create("vit_8", num_classes=10, image_shape=(1, 8, 8))
    assert set(weights) == set(model.state_dict())
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.view(-1), reader(name, "weight", 0, weight.numel()))


def test_every_look_was_probed(run):
    rows = lines(run / "probe.jsonl")
    assert [r["step"] for r in rows] == [0, 5, 10, 15]
    steps = {r["step"]: r for r in lines(run / "metrics.jsonl") if "eval_top1" not in r}
    for row in rows:
        assert row["gv_norm"] == pytest.approx(steps[row["step"]]["gv_norm"], rel=1e-4)
        assert row["g_norm"] == pytest.approx(steps[row["step"]]["grad_norm"], rel=1e-4)
        assert row["gs_norm"] ** 2 == pytest.approx(
            row["gh_norm"] ** 2 + row["gv_norm"] ** 2, rel=1e-3
        )
    assert all("gv_change" in row for row in rows[1:])


def test_config_yaml_makes_the_same_run_again(run):
    """What was chosen by default stands in it, so it holds on another machine, too."""
    written = config.parse(["--config", str(run / "config.yaml")])
    assert written.micro_batch == 32 and written.steps == STEPS and written.base == "adamw"
    assert None not in (written.lr, written.rho, written.weight_decay, written.warmup_steps)
    again = written.resolved(ranks=1, launcher="single", samples=1437)
    assert again == written


def test_print_config_can_be_read_back(capsys, tmp_path):
    flags = ["--optimizer", "sam", "--base", "lamb", "--betas", "0.8,0.9", "--offload",
             "--zero_stage", "1", "--p", "inf", "--lr", "3e-3"]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        config.parse([*flags, "--print_config"])
    assert left.value.code in (0, None)
    text = capsys.readouterr().out
    (tmp_path / "all.yaml").write_text(text)
    assert config.parse(["--config", str(tmp_path / "all.yaml")]) == config.parse(flags)
    assert yaml.safe_load(text)["lr"] == 3e-3


def test_flags_override_the_file_wherever_they_stand(tmp_path):
    (tmp_path / "some.yaml").write_text("k: 7\nrho: 0.3\n")
    for argv in (["--k", "9", "--config"], ["--config"]):
        settings = config.parse([*argv, str(tmp_path / "some.yaml"), *(["--k", "9"])])
        assert (settings.k, settings.rho) == (9, 0.3)


@pytest.mark.parametrize("stopped", [7, 14], ids=["mid_cycle", "before_a_reuse"])
def test_a_resumed_run_is_as_if_it_had_never_stopped(run, stopped, tmp_path):
    """Killed some steps after a checkpoint: same weights to the bit, same lines, none twice."""
    out = tmp_path / "resumed"
    shutil.copytree(run, out)
    for later in (out / "checkpoints").iterdir():
        if int(later.name.removeprefix("step-")) > stopped:
            shutil.rmtree(later)
    rows = lines(out / "metrics.jsonl")
    kept = [r for r in rows if r["step"] < stopped + 2]
    text = "".join(json.dumps(r) + "\n" for r in kept) + '{"step": 99, "lo'
    (out / "metrics.jsonl").write_text(text)
    for name in ("summary.json", "model.safetensors", "curves.png"):
        (out / name).unlink()
    assert main([*TINY, "--out", str(out), "--resume", "auto"]) == 0
    want, got = load_file(run / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert without_clocks(lines(out / "metrics.jsonl")) == without_clocks(rows)
    same = ("top1", "steps", "forward_backward_passes")
    a, b = (json.loads((d / "summary.json").read_text()) for d in (run, out))
    assert [a[x] for x in same] == [b[x] for x in same]
    assert [r["step"] for r in lines(out / "probe.jsonl")] == [0, 5, 10, 15]


def test_a_finished_run_resumed_trains_nothing_and_says_the_same(run, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(run, out)
    assert main([*TINY, "--out", str(out), "--resume", "auto"]) == 0
    before, after = (json.loads((d / "summary.json").read_text()) for d in (run, out))
    assert {k: after[k] for k in SUMMARY - {"seconds", "images_per_s"}} == {
        k: before[k] for k in SUMMARY - {"seconds", "images_per_s"}
    }
    assert without_clocks(lines(out / "metrics.jsonl")) == without_clocks(
        lines(run / "metrics.jsonl")
    )


def test_a_run_resumed_by_its_name_and_lengthened_says_where_its_schedule_is(run, tmp_path, capsys):
    """lr jumped from the end of a cosine to that of the longer run without a word."""
    longer = [*TINY, "--steps", "22", "--out", str(tmp_path / "longer")]
    assert main([*longer, "--resume", str(run)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    rows = [r for r in lines(tmp_path / "longer" / "metrics.jsonl") if "lr" in r]
    before = next(r for r in lines(run / "metrics.jsonl") if r["step"] == 19)
    peak = yaml.safe_load((run / "config.yaml").read_text())["lr"]
    share = rows[0]["lr"] / peak
    assert rows[0]["step"] == 20 and rows[0]["lr"] > 2 * before["lr"]
    assert (
        f"the schedule is that of 22 steps: lr goes on at {share:.1%} of its peak at step 20, "
        f"where that of 20 steps has 0.0%"
    ) in told
    assert main([*TINY, "--out", str(tmp_path / "x"), "--resume", str(tmp_path)]) == 2
    assert "or a run that has one, got" in capsys.readouterr().err


def test_a_fresh_run_keeps_the_older_one(tmp_path):
    out = tmp_path / "run"
    short = ["--data", "digits", "--steps", "1", "--optimizer", "sgd", "--out", str(out)]
    for _ in range(3):
        assert main(short) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert all((tmp_path / n / "summary.json").exists() for n in ("run", "run.1", "run.2"))


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_run_keeps_others_out_of_its_directory_while_it_lives(resume, tmp_path):
    """The default --out is the same for all: a second start moved the first one's directory away,
    or, resuming, wrote every step twice. When the first is gone, by SIGKILL too, it is free."""
    out = tmp_path / "run"
    long = ["--data", "digits", "--optimizer", "sgd", "--workers", "0", "--save_every", "5"]
    command = [sys.executable, str(ROOT / "train.py"), *long, "--out", str(out)]
    first = subprocess.Popen([*command, "--steps", "99999"], stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not checkpoint.found(out / "checkpoints"):
            assert time.monotonic() < end and first.poll() is None
            time.sleep(0.1)
        second = [*command, "--steps", "99999", "--resume", resume]
        done = subprocess.run(second, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"into which process {first.pid} on" in done.stderr
        assert first.poll() is None and sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    finally:
        first.kill()
        first.wait()
    assert main([*long, "--steps", "1", "--out", str(out)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1"]
