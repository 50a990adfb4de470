"""launch/recipes/: all pass the dry run, say what they rest on, and train when scaled down."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from dist_looksam.errors import ConfigError
from dist_looksam.run import dryrun, recipes
from dist_looksam.run.train import main
from dist_looksam.settings import config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
PUBLIC = "vit_b16-lamb_public-32k"
DEIT3 = [p for p in FILES if p.stem.startswith("deit3_")]
FINETUNE = "vit_b16-finetune-1k"
OURS = [p for p in FILES if p.stem not in (PUBLIC, FINETUNE) and p not in DEIT3]
METHODS = ("adamw", "lamb", "sam", "look_sam", "layer_sam", "look_layer_sam")
# batch: steps of 300 epochs of 1,281,167 images, warm-up, lr from 3e-3 and from 1e-2. By hand.
ARITHMETIC = {
    4: (93_835, 10_000, 0.0030, 0.0100),
    8: (46_918, 5_000, 0.0042, 0.0141),
    16: (23_459, 2_500, 0.0060, 0.0200),
    32: (11_729, 1_250, 0.0085, 0.0283),
    64: (5_865, 625, 0.0120, 0.0400),
}


@pytest.fixture(scope="module")
def make():
    """launch/recipes/make.py as a module."""
    spec = importlib.util.spec_from_file_location("make_recipes", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_recipe_for_every_model_method_and_batch():
    wanted = {f"{m}-{o}-{b}k" for m in ("vit_s16", "vit_b16") for o in METHODS for b in ARITHMETIC}
    assert {p.stem for p in OURS} == wanted
    methods = ("lamb", "look_layer_sam")
    wanted = {
        f"{m}-{o}-{b}k" for m in ("deit3_s16", "deit3_b16") for o in methods for b in ARITHMETIC
    }
    assert {p.stem for p in DEIT3} == wanted and FOLDER / f"{PUBLIC}.yaml" in FILES
    assert FOLDER / f"{FINETUNE}.yaml" in FILES


def test_every_recipe_passes_the_check(capsys):
    assert recipes.main(["check"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "82 recipes, 0 wrong"
    assert [re.split(r"[ :]+", line)[1] for line in told[:-1]] == [p.name for p in recipes.found()]


def test_the_files_are_what_make_py_writes(make):
    """So that a number stands once: change it in make.py, not in 82 files."""
    made = make.files()
    assert set(made) == {p.name for p in FILES} | {"README.md"}
    for name, text in made.items():
        assert (FOLDER / name).read_text() == text, f"{name}: run python launch/recipes/make.py"


@pytest.mark.parametrize("batch", ARITHMETIC)
def test_steps_warm_up_and_lr_are_the_arithmetic_done_by_hand(batch):
    steps, warmup, adamw, lamb = ARITHMETIC[batch]
    for path in OURS:
        if path.stem.endswith(f"-{batch}k"):
            found = recipes.checked(path)
            base = {"adamw": adamw, "lamb": lamb}[found.settings.base]
            assert (found.steps, found.settings.warmup_steps) == (steps, warmup), path
            assert found.lr == pytest.approx(base, abs=5e-5), path
            assert found.settings.batch_size == batch * 1024 and found.settings.clip == 1.0


def test_the_public_recipe_has_its_own_numbers():
    """Half of 300 x 1,281,167 / 32,768 steps of warm-up; lr as it stands."""
    found = recipes.checked(FOLDER / f"{PUBLIC}.yaml")
    s = found.settings
    assert (found.steps, s.warmup_steps, found.lr) == (11_729, 5_865, 0.018)
    assert (s.batch_size, s.optimizer, s.weight_decay) == (32_768, "lamb", 0.1)
    assert (s.clip, s.schedule, s.precision) == (1.0, "linear", "fp16")
    assert s.augment == "crop,flip,mixup" and s.lr_scaling == "none"


def test_recipes_after_deit3_have_its_numbers_at_2048_and_grow_them_by_the_rules():
    """At 16k, 8 times its batch: lr grows by sqrt(8); 800 and 5 epochs of 1,281,167 images."""
    for model, lr, drop, side in (("s", 0.0113137, 0.05, 224), ("b", 0.0084853, 0.2, 192)):
        for method in ("lamb", "look_layer_sam"):
            found = recipes.checked(FOLDER / f"deit3_{model}16-{method}-16k.yaml")
            s = found.settings
            assert found.lr == pytest.approx(lr, rel=1e-5)
            assert (found.steps, s.warmup_steps) == (62_557, 391)
            assert (s.optimizer, s.base, s.loss, s.bce_target_thresh) == (method, "lamb", "bce", 0)
            assert (s.weight_decay, s.eps, s.clip, s.label_smoothing) == (0.05, 1e-8, 1.0, 0.0)
            assert (s.drop_path, s.image_size, s.model) == (drop, side, f"deit3_{model}16")
            assert s.augment == "crop,flip,3augment,jitter:0.3,mixup:0.8,cutmix:1,repeat:4"


def test_the_recipe_of_fine_tuning_is_that_of_mae():
    """Its lr at 256 grows with the batch; 5 of 100 epochs of warm-up, by hand."""
    found = recipes.checked(FOLDER / f"{FINETUNE}.yaml")
    s = found.settings
    assert (found.steps, s.warmup_steps, found.lr) == (125_114, 6_256, 0.002)
    assert (s.layer_decay, s.weight_decay, s.drop_path) == (0.65, 0.05, 0.1)
    assert found.lrs == (pytest.approx(0.002 * 0.65**13), 0.002) and s.clip is None


def test_the_cost_is_that_of_the_operations_and_a_little_for_the_rest():
    """12 blocks of attention and MLP on 196 patches are 34.9 GFLOP; 3.6 of them an image at k = 5.
    By hand; sending and updating come on top, less than a tenth at 512 images a GPU."""
    found = recipes.checked(FOLDER / "vit_b16-look_layer_sam-32k.yaml")
    tokens, dim = 14 * 14, 768
    block = 24 * tokens * dim * dim + 4 * tokens * tokens * dim
    ends = 2 * (tokens * 768 * dim + dim * 1000)
    per_image = 3 * (12 * block + ends) * 1.2
    for share in (dryrun.LOW, dryrun.SHARE, dryrun.HIGH):
        hours = 300 * 1_281_167 * per_image / (64 * share * 989e12) / 3600
        assert hours < found.plans[share].hours < 1.1 * hours
    sam = recipes.checked(FOLDER / "vit_b16-sam-32k.yaml")
    base = recipes.checked(FOLDER / "vit_b16-adamw-32k.yaml")
    assert sam.passes == 2 * base.passes
    assert sam.plan.hours == pytest.approx(2 * base.plan.hours, rel=0.02)


def test_every_recipe_fits_an_h200_as_planned():
    for path in FILES:
        found = recipes.checked(path)
        assert found.plan is not None and dryrun.notes(found) == [], path
        assert found.plan.memory.peak < 0.5 * 141e9  # the plan's own error is a tenth


def test_a_recipe_is_named_without_its_path_and_a_wrong_name_is_one_sentence(capsys):
    named = config.parse(["--config", "recipe:vit_b16-sam-4k", "--ranks", "8", "--dry_run"])
    path = str(FOLDER / "vit_b16-sam-4k.yaml")
    assert named == config.parse(["--config", path, "--ranks", "8", "--dry_run"])
    assert recipes.main(["check", "recipe:vit_b16-sam-4k"]) == 0
    with pytest.raises(ConfigError, match=r"got 'vit_b16-sam-4'; did you mean recipe:vit_b16-sam"):
        config.parse(["--config", "recipe:vit_b16-sam-4"])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_commands_in_a_header_can_be_typed(path):
    """Their flags are known to train.py, and name this file."""
    header = [line[1:].strip() for line in path.read_text().splitlines() if line[:1] == "#"]
    commands = re.findall(
        r"(?:train\.py|slurm\.sbatch) (--[^;]*?);", ";".join(header).replace("\\;", "")
    )
    assert len(commands) == 3
    for command in commands:
        settings = config.parse(command.split())
        assert str(path.relative_to(ROOT)) in command
        assert settings.dry_run or (settings.data_dir, settings.out) == (
            "/data/imagenet",
            f"runs/{path.stem}",
        )


def test_a_recipe_says_nothing_against_what_slurm_sbatch_puts_before_it():
    """--config wins over flags before it: with `out` in a recipe a job would look for its
    summary.json in the wrong folder, and requeue for ever."""
    for path in FILES:
        assert not {"out", "resume", "seed", "requeue"} & set(yaml.safe_load(path.read_text()))
    first = ["--out", "runs/slurm-7", "--resume", "auto", "--config", str(FILES[0])]
    settings = config.parse(first)
    assert (settings.out, settings.resume) == ("runs/slurm-7", "auto")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_number_has_a_source_or_a_rule_that_is_explained(path):
    text = path.read_text()
    head, body = text.split("\n\n")
    for name in re.findall(r"\[(\w+)\]", body):
        assert f"[{name}] " in head
    for setting in ("epochs", "lr", "lr_scaling", "warmup_steps", "weight_decay", "clip", "rho"):
        line = re.search(rf"^{setting.replace('_steps', '_(steps|epochs)')}:.*$", body, re.M)
        if line or setting != "rho":
            assert line and re.search(r"# .*(\[\w+\]|no source)", line[0]), setting
    assert "computed (dist-looksam plan) and not measured" in head


def test_recipes_with_an_ascent_name_an_m_that_no_batch_changes():
    """Without, they climbed along the mean of up to 65,536 samples: no published ViT did."""
    for path in FILES:
        settings = recipes.checked(path).settings
        climbs = "sam" in settings.optimizer
        assert settings.m == ({"s": 256, "b": 64}[settings.model[-3]] if climbs else None)
        own = "fp16" if "public" in path.name else "bf16"
        assert (settings.backend, settings.precision) == (
            ("ddp", "fp16") if climbs else ("zero", own)
        )


def test_the_list_shows_every_recipe(capsys):
    assert recipes.main([]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:4] == ["recipe", "steps", "warm-up", "lr"] and len(rows) == 84
    assert ["vit_b16-look_layer_sam-64k", "5,865", "625", "0.04", "0.0007"] in [r[:5] for r in rows]


def test_other_files_and_other_ranks_are_checked(tmp_path, capsys):
    wrong = tmp_path / "mine.yaml"
    wrong.write_text("optimizer: adam\n")
    good = str(FOLDER / "vit_b16-sam-4k.yaml")
    assert (
        recipes.main(["check", "--ranks", "32", good, str(wrong), str(tmp_path / "no.yaml")]) == 2
    )
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("good   vit_b16-sam-4k.yaml")
    assert told[1].startswith("wrong  mine.yaml: optimizer must be one of")
    assert "not found" in told[2] and told[3] == "3 recipes, 2 wrong"
    assert recipes.main(["check", good, "--ranks", "48"]) == 2
    assert "use 3072 or 6144" in capsys.readouterr().out


def test_a_recipe_scaled_down_trains_as_its_dry_run_said(tmp_path, capsys):
    """Everything that is not overridden reaches the run: rho, k, reuse, clip, scaled lr."""
    path, out = FOLDER / "vit_s16-look_layer_sam-4k.yaml", tmp_path / "run"
    flags = ["--config", str(path), "--data", "digits", "--data_dir", "none", "--model", "vit_8",
             "--batch_size", "64", "--micro_batch", "32", "--steps", "6", "--group", "16",
             "--warmup_steps", "1", "--precision", "fp32", "--backend", "plain"]  # fmt: skip
    flags += ["--out", str(out)]
    assert main([*flags, "--ranks", "1", "--dry_run"]) == 0
    assert not out.exists()
    told = capsys.readouterr().out
    assert "6 steps" in told and "8, 2 of them for looks" in told
    assert main(flags) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["forward_backward_passes"]) == (6, 8)
    written = yaml.safe_load((out / "config.yaml").read_text())
    asked = yaml.safe_load(path.read_text())
    for name in ("optimizer", "base", "rho", "alpha", "k", "reuse", "clip", "weight_decay", "lr"):
        assert written[name] == asked[name], name
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(r["lr"] for r in rows if "lr" in r) == pytest.approx(0.01 * (64 / 4096) ** 0.5)
    assert all(r["update_norm"] <= 1.0001 for r in rows if "update_norm" in r)
    assert "ranks" not in written and "dry_run" not in written
