"""--dry_run finds what is wrong before a start, says what the rest means, and leaves no trace."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dist_looksam.data import load
from dist_looksam.data.extent import extent
from dist_looksam.plan import plan
from dist_looksam.run import dryrun
from dist_looksam.run.train import main
from dist_looksam.settings import config

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch" / "recipes" / "vit_b16-look_layer_sam-32k.yaml"
# name: (changes to the recipe, None drops a line; what the sentence says)
WRONG = {
    "key": ({"warmup": 5}, "unknown setting, got warmup; did you mean warmup_steps"),
    "value": ({"lr": "high"}, "lr must be a number, got 'high'"),
    "range": ({"weight_decay": -0.1}, "weight_decay must be >= 0 and finite, got -0.1"),
    "optimizer": ({"optimizer": "looksam"}, "optimizer must be one of .*got 'looksam'"),
    "base": ({"base": "adam"}, "base must be one of sgd, adamw, lamb, lars.*, got 'adam'"),
    "base of a base": ({"optimizer": "adamw"}, "base must be adamw with optimizer adamw, got lamb"),
    "warm-up": (
        {"warmup_steps": 11_729},
        "warm-up must be shorter than the run's 11729 steps, got 11729; use --warmup_steps 586",
    ),
    "batch": ({"batch_size": 32_000}, "micro_batch 512 x 64 .*got 32000; use .* batch_size 32768"),
    "ranks": ({"ranks": 48}, "micro_batch 512 x 48 ranks .*got 32768; use 24576 or 49152"),
    "no ranks": ({"ranks": 0}, "ranks must be >= 1 and finite, got 0"),
    "model": ({"model": "vit_x16"}, "model must be one of auto, .*got 'vit_x16'"),
    "image": ({"image_size": 225}, "16x16 patches, got 225x225 images"),
    "augment": ({"augment": "crop,flop"}, "--augment knows no 'flop'"),
    "pairs": ({"augment": "mixup", "micro_batch": 1}, "micro_batch must be even"),
    "repetition": ({"augment": "repeat:3"}, "a multiple of 3 .*got 32768; use 32766 or 32769"),
    "no mixing": ({"mixup_until": 0.9}, "mixup_until needs mixup or cutmix .*got 0.9 with 'crop"),
    "nothing for the device": (
        {"augment_on": "device"}, "augment_on device needs randaugment, .*got 'crop.*; add one of"),
    "end of mixing": ({"augment": "mixup", "mixup_until": -1}, "mixup_until must be >= 0"),
    "fp16 at stage 0": ({"zero_stage": 0}, "fp16 needs ZeRO stage 1, 2 or 3, got stage 0"),
    "stage": ({"zero_stage": 5}, "zero_stage must be 0, 1, 2 or 3, got 5"),
    "stage of ddp": ({"backend": "ddp"}, "zero_stage is of the backends zero"),
    "rank ascent": (
        {"ascent": "rank", "zero_stage": 2},
        "m must be 32768 on .* zero .*got 512 by ascent rank; use --group 32768, or backend ddp"),
    "horovod": ({"backend": "horovod", "zero_stage": 2}, "horovod shards at zero_stage 1 only"),
    "compression": ({"compression": "fp16"}, "compression fp16 is of backend horovod"),
    "fsdp2": ({"backend": "fsdp2"}, "zero_stage is of .* got backend fsdp2"),
    "rank ascent of fsdp2": (
        {"backend": "fsdp2", "zero_stage": None, "ascent": "rank"},
        "m must be 32768 on .* fsdp2 .*got 512 by ascent rank; use --group 32768, or backend ddp"),
    "m": (
        {"backend": "ddp", "zero_stage": None, "precision": "bf16", "m": 300},
        "got 300 with 1 x 64 micro-batches of 512; use --group 256, which is the nearest"),
    "m and ascent": (
        {"backend": "ddp", "zero_stage": None, "precision": "bf16", "m": 1024, "ascent": "rank"},
        "m must be batch_size / ranks .* is 512, got 1024; leave out --ascent or --group"),
    "m of no sample": ({"m": 0}, "m must be >= 1 and finite, got 0"),
    "held out": ({"holdout": 1_281_167}, "holdout must be from 0 to 1281166.*got 1281167"),
    "two lengths": ({"steps": 5}, "either epochs or steps .*leave one out"),
    "rho": ({"rho": -1}, "rho must be >= 0 and finite, got -1"),
    "no folder": ({"data_dir": None}, "--data folder needs --data_dir"),
    "data": ({"data": "imagenet"}, "--data is 'imagenet', which is not known"),
    "plain": ({"backend": "plain", "zero_stage": None}, "backend plain is for one rank, got 64"),
}  # fmt: skip


def changed(tmp_path: Path, **changes: object) -> Path:
    """A copy of the recipe on ZeRO, with other settings; None drops a line."""
    zero = {"backend": "zero", "zero_stage": 1, "m": None}
    values = yaml.safe_load(RECIPE.read_text()) | zero | changes
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_one_sentence_and_exit_code_2(name, tmp_path, capfd):
    changes, says = WRONG[name]
    out = tmp_path / "out"
    path = changed(tmp_path, **changes)
    assert main(["--config", str(path), "--dry_run", "--out", str(out)]) == 2
    told = capfd.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1, told.err
    assert re.search(says, told.err), told.err
    assert not out.exists()


@pytest.mark.parametrize("holdout", [1437, 5000])
def test_holding_out_all_images_is_the_sentence_of_a_real_start(holdout, tmp_path, capfd):
    """The settings were good with -3,563 images; with 1437 held out it was a traceback."""
    flags = ["--data", "digits", "--steps", "5", "--holdout", str(holdout)]
    told = []
    for more in (["--dry_run"], ["--out", str(tmp_path / "out")]):
        assert main([*flags, *more]) == 2
        told.append(capfd.readouterr().err)
    assert told[0] == told[1] and told[0].startswith("error: holdout must be from 0 to 1436"), told
    with pytest.raises(config.ConfigError, match="holdout must be from 0 to 1436"):
        plan(config.parse(flags), gpus=1)


def test_a_good_recipe_is_a_short_summary(tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["--config", str(RECIPE), "--dry_run", "--out", str(out)]) == 0
    told = capfd.readouterr()
    assert told.err == "" and not out.exists()
    assert len(told.out.splitlines()) == 18
    for says in (
        "look_layer_sam on lamb: rho 0.0007 (layer scope), k 5, alpha 0.7, reuse paper",
        "vit_b16, 86,566,120 parameters, 34.9 GFLOP forward",
        "taken for ImageNet-1k: 1,281,167 images of 3x224x224, 1,000 classes",
        "augmented   crop, flip\n",
        "32,768 = 512 x 64 ranks x 1",
        "11,729 steps, 300 epochs",
        "0.0283 after 1,250 steps of warm-up, then cosine to 0",
        "weight decay 0.1, clip 1.0",
        "14,075, 2,346 of them for looks",
        "2,346, every 5 steps from step 0 to step 11,725",
        "m           64: 512 groups",
        "ddp, fp16",
        "GB of an H200's 141",
        "64 H200 at 30% (20%-40%) of their peak",
        f"anew in {out}",
    ):
        assert says in told.out, told.out


def test_ranks_are_those_of_the_flag_then_of_the_file_then_those_started(tmp_path, capfd):
    for flags, says in (
        (["--config", str(RECIPE), "--ranks", "16"], "512 x 16 ranks x 4"),
        (["--config", str(RECIPE)], "512 x 64 ranks x 1"),
        (["--data", "digits"], "128 = 128 x 1 ranks x 1"),
    ):
        assert main([*flags, "--dry_run"]) == 0
        assert says in capfd.readouterr().out


def test_a_machine_without_deepspeed_can_check_a_recipe_for_it(monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    zero = ["--backend", "zero", "--group", "32768"]
    assert main(["--config", str(RECIPE), *zero, "--dry_run"]) == 0
    assert (
        "note: here, backend zero needs deepspeed, which is not installed" in capfd.readouterr().out
    )


def test_a_dry_run_imports_nothing_big_and_makes_no_weights():
    """86 M parameters would be 346 MB."""
    code = (
        "import resource, sys; from dist_looksam.run import train; import torch\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"assert train.main(['--config', {str(RECIPE)!r}, '--dry_run']) == 0\n"
        "more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "big = ('deepspeed', 'horovod', 'sklearn', 'altair', 'vl_convert')\n"
        "print([m for m in big if m in sys.modules], more)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("[] ")
    assert int(last.split()[-1]) < 150_000, last  # kB


def test_a_small_model_is_given_no_hours(capfd):
    """vit_8 on an H200 was promised 0.04 seconds: its time is that of launching kernels."""
    assert main(["--data", "digits", "--dry_run"]) == 0
    planned = capfd.readouterr().out.splitlines()[-1]
    assert planned.split()[0] == "planned" and "H200" not in planned, planned


@pytest.mark.parametrize("flags, row", [
    ("--loss bce --bce_target_thresh 0.2", "binary cross-entropy, targets above 0.2 are 1, others"),
    ("--loss bce --label_smoothing 0.1", "binary cross-entropy, label smoothing 0.1"),
    ("--class_weights balanced", "cross-entropy, class weights balanced"),
    ("", None),
])  # fmt: skip
def test_the_loss_and_averages_of_weights_are_rows_where_they_are_not_the_plain_ones(
    flags, row, capfd
):
    """Neither was mentioned."""
    assert main(["--data", "digits", "--dry_run", "--ema", "0.9998", *flags.split()]) == 0
    said = capfd.readouterr().out
    assert "averages    of the weights, decay 0.9998 after a warm-up\n" in said
    assert f"loss        {row}" in said if row else "  loss " not in said


def test_what_is_said_of_embedded_data_is_true(needs):
    needs("fashion_mnist")
    for name in ("digits", "fashion_mnist"):
        said, data = extent(name, None, image_size=224, augment="auto"), load(name)
        assert said.samples == len(data.train)
        assert (said.classes, said.shape) == (data.num_classes, data.shape)
        assert said.class_names == data.train.class_names == data.test.class_names


def test_a_folder_that_is_here_is_opened(tmp_path, capfd):
    for split, count in (("train", 8), ("val", 1)):
        for name in ("cats", "dogs", "owls"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40)).save(folder / f"{i}.png")
    flags = ["--data", "folder", "--data_dir", str(tmp_path), "--batch_size", "8", "--dry_run"]
    assert main(flags) == 0
    assert "24 images of 3x224x224, 3 classes" in capfd.readouterr().out
    (tmp_path / "val" / "cats" / "0.png").unlink()
    assert main(flags) == 2
    assert "cats" in capfd.readouterr().err


@pytest.mark.parametrize("changes, says", [
    ({"precision": "bf16"}, "bf16 weights round much of a perturbation of rho 0.0007"),
    ({"optimizer": "look_sam", "rho": 0.2, "precision": "bf16"}, "rho 0.2 (model scope)"),
    ({"optimizer": "layer_sam"}, "--reuse: no effect with optimizer layer_sam on lamb"),
    ({"clip": None}, "no clip at batch 32,768"),
    ({"offload": True}, "not planned: plan counts no offload"),
    ({"micro_batch": 2**15, "batch_size": 2**21, "warmup_steps": 9}, "micro_batch must fit h200"),
])  # fmt: skip
def test_what_is_seldom_meant_is_a_note(changes, says, tmp_path):
    settings = config.parse(["--config", str(changed(tmp_path, **changes))])
    found = dryrun.notes(dryrun.check(settings, ranks=64, opened=False))
    assert len(found) == 1 and says in found[0], found
    clean = config.parse(["--config", str(RECIPE)])
    assert dryrun.notes(dryrun.check(clean, ranks=64, opened=False)) == []


def test_a_flag_wins_over_what_the_file_says_against_it(tmp_path):
    """--steps on a recipe of epochs was refused, as if both had been asked for."""
    recipe = ["--config", str(changed(tmp_path))]
    assert config.parse([*recipe, "--steps", "5"]).epochs is None
    assert config.parse([*recipe, "--backend=ddp"]).zero_stage is None
    assert config.parse([*recipe, "--backend", "horovod"]).zero_stage == 1
    steps = changed(tmp_path, epochs=None, steps=7)
    assert config.parse(["--config", str(steps), "--epochs", "2"]).steps is None
    for both in (["--steps", "5", "--epochs", "2"], ["--backend", "ddp", "--zero_stage", "1"]):
        with pytest.raises(config.ConfigError):
            config.parse([*recipe, *both])


@pytest.mark.parametrize(("lines", "flags", "backend"), [
    ("backend: ddp\n", ["--zero_stage", "2"], "zero"),
    ("backend: plain\n", ["--zero_stage=0"], "zero"),
    ("backend: ddp\n", ["--offload"], "zero"),
    ("backend: horovod\n", ["--deepspeed_config", "ds.json"], "zero"),
    ("backend: horovod\n", ["--zero_stage", "1"], "horovod"),
    ("backend: ddp\n", ["--zero_stage", "none"], "ddp"),
    ("backend: ddp\n", ["--no_offload"], "ddp"),
    ("backend: zero\ndeepspeed_config: ds.json\n", ["--backend", "ddp"], "ddp"),
    ("backend: zero\ndeepspeed_config: ds.json\noffload: true\n", ["--backend=horovod"], "horovod"),
])  # fmt: skip
def test_flags_move_a_file_onto_zero_and_off_it(lines, flags, backend, tmp_path):
    """--zero_stage 2 over a file of ddp was refused; --backend ddp left the file's
    deepspeed_config, which ddp refuses."""
    (tmp_path / "file.yaml").write_text(lines)
    settings = config.parse(["--config", str(tmp_path / "file.yaml"), *flags])
    assert settings.backend == backend
    if backend != "zero":
        assert settings.deepspeed_config is None and not settings.offload


def test_ranks_of_a_file_ask_for_no_dry_run(capfd):
    """A recipe says what --dry_run checks for; as a flag of a real start it would do nothing."""
    assert config.parse(["--config", str(RECIPE)]).ranks == 64
    assert config.parse(["--config", str(RECIPE), "--ranks", "16", "--dry_run"]).ranks == 16
    assert main(["--config", str(RECIPE), "--ranks=16"]) == 2
    assert "got --ranks 16 without it; leave it out" in capfd.readouterr().err


def test_only_the_first_rank_speaks(monkeypatch, capfd):
    names = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**names, "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    told = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["--data", "digits", "--dry_run"]) == 0
        told.append(capfd.readouterr().out)
    assert "64 x 2 ranks x 1" in told[0] and told[1] == ""


def test_a_real_start_refuses_a_warm_up_that_never_ends(tmp_path, capfd):
    flags = [
        "--data",
        "digits",
        "--steps",
        "5",
        "--warmup_steps",
        "5",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(flags) == 2
    assert "use --warmup_steps 0 or train longer" in capfd.readouterr().err


def test_it_says_where_a_start_would_begin_and_refuses_what_the_start_would(tmp_path, capfd):
    out = tmp_path / "run"
    flags = ["--data", "digits", "--steps", "5", "--save_every", "2", "--out", str(out)]
    assert main(flags) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}

    def dry(*more: str) -> tuple[int, str]:
        capfd.readouterr()
        code = main([*flags, "--dry_run", *more])
        told = capfd.readouterr()
        return code, told.out + told.err

    code, said = dry()
    assert code == 0 and f"begins      anew in {out}; the run that is there gets" in said
    code, said = dry("--resume", "auto", "--rho", "0.01")
    assert code == 0 and f"begins      at step 5, from {out / 'checkpoints' / 'step-5'}," in said
    assert "note: rho is 0.01, was 0.0005 when the checkpoint was written" in said
    code, said = dry("--resume", "auto", "--seed", "3")
    assert code == 2 and "seed must be as in the checkpoint" in said
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}

    for n in (5, 4):
        (out / "checkpoints" / f"step-{n}" / "manifest.json").write_text("{")
    code, said = dry("--resume", "auto")
    assert code == 0 and "at step 2, from" in said and said.count("is damaged or foreign") == 2
    (out / "checkpoints" / "step-2" / "manifest.json").write_text("{")
    code, said = dry("--resume", "auto")
    assert code == 1 and "or start anew with --resume none" in said
