"""`--init` in runs of train.py: from files, runs, checkpoints and timm, said in log.txt."""

import json
import shutil
import sys
import types

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dist_looksam import models
from dist_looksam.cli.main import main
from dist_looksam.models.named import SIZES
from dist_looksam.models.timm_form import as_timm
from dist_looksam.models.vit import Size
from dist_looksam.run import results

TRAIN = ["train", "--device", "cpu", "--workers", "0", "--augment", "none"]
DIGITS = [*TRAIN, "--data", "digits", "--batch_size", "64"]
# vit_8 on 28x28 pixels has 14x14 patches, where it has 4x4 on digits.
FASHION = [*TRAIN, "--data", "fashion_mnist", "--model", "vit_8", "--batch_size", "16"]
FASHION += ["--train_images", "96", "--holdout", "32", "--steps", "3"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("init") / "digits"
    assert main([*DIGITS, "--steps", "30", "--ema", "0.8", "--out", str(out)]) == 0
    return out


def log(out):
    return (out / "log.txt").read_text()


def top1(out):
    return json.loads((out / "summary.json").read_text())["top1"]


@pytest.mark.needs("fashion_mnist")
def test_fashion_mnist_by_the_weights_of_digits(digits, tmp_path, capsys):
    """To the end; ten other classes have a new head, though as many."""
    flags = ["--init", str(digits), "--layer_decay", "0.75", "--head_lr", "2"]
    flags += ["--freeze", "patch_embed", "--out", str(tmp_path / "run")]
    assert main([*FASHION, *flags, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert main([*FASHION, *flags]) == 0
    file = digits / "model.safetensors"
    want = f"init: 53 of 55 entries are from {file}; positions interpolated from 4x4 to 14x14; "
    for text in (said, log(tmp_path / "run")):
        assert want + "made anew for 10 classes: head.weight, head.bias" in text
        assert "warning: init" not in text
    assert "trained     213,258 of 213,578 parameters; lr 0.00237 to 0.02 by layer" in said
    got, start = load_file(tmp_path / "run" / "model.safetensors"), load_file(file)
    assert torch.equal(got["patch_embed.weight"], start["patch_embed.weight"])
    assert not torch.equal(got["norm.weight"], start["norm.weight"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["lr"] == 0.01  # of the layers whose factor is 1


def test_a_run_its_average_a_checkpoint_and_a_file_are_starts(digits, tmp_path):
    """A step with lr 0 keeps what they have learnt."""
    summary = json.loads((digits / "summary.json").read_text())
    alone = tmp_path / "alone"
    shutil.copytree(digits / "checkpoints", alone / "checkpoints")
    pickled = tmp_path / "weights.pth"
    torch.save({"state_dict": load_file(digits / "model.safetensors")}, pickled)
    starts = {digits: "top1", digits / "model_ema.safetensors": "ema_top1", alone: "top1"}
    for number, (path, key) in enumerate({**starts, pickled: "top1"}.items()):
        out = tmp_path / f"run-{number}"
        flags = ["--steps", "1", "--lr", "0", "--init", str(path), "--out", str(out)]
        assert main([*DIGITS, *flags]) == 0
        assert f"init: 55 of 55 entries are from {path}" in log(out)
        assert top1(out) == summary[key], path


def folder_of(root, *classes):
    """A data folder of one picture of each class in each split."""
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(root / split / name / "a.png")
    return root


def notes_on_init(text):
    return [line[line.index("init: ") :] for line in text.splitlines() if " init: " in line]


def test_the_dry_run_says_of_the_head_what_the_start_says(digits, tmp_path, capsys, monkeypatch):
    """It compared the names of the data sets, and the start those of the classes."""
    monkeypatch.setattr(results, "_draw", lambda out: "")
    pets = folder_of(tmp_path / "pets", "cat", "dog")
    small = [*TRAIN, "--data", "folder", "--image_size", "8", "--model", "vit_8"]
    small += ["--batch_size", "2", "--steps", "1", "--lr", "0"]

    def both(flags, file):
        flags = [*flags, "--init", str(file), "--out", str(tmp_path / "run")]
        assert main([*flags, "--dry_run"]) == 0
        said = notes_on_init(capsys.readouterr().out)
        assert main(flags) == 0
        capsys.readouterr()
        assert notes_on_init(log(tmp_path / "run"))[-len(said) :] == said
        assert len(said) == 1
        return said[0].partition("; made anew ")[2]

    files = {"own": tmp_path / "own.safetensors", "other": tmp_path / "foreign.safetensors"}
    assert main([*small, "--data_dir", str(pets), "--out", str(tmp_path / "first")]) == 0
    shutil.copy(tmp_path / "first" / "model.safetensors", files["own"])
    save_file(load_file(files["own"]), files["other"])  # as others write it, without classes
    new = "for {} classes: head.weight, head.bias"
    folders = {
        "the same": (pets, "", ""),
        "more": (folder_of(tmp_path / "more", "cat", "dog", "fish"), new.format(3), new.format(3)),
        "others": (folder_of(tmp_path / "others", "fox", "owl"), new.format(2), ""),
    }
    for place, of_own, of_other in folders.values():
        flags = [*small, "--data_dir", str(place)]
        assert (both(flags, files["own"]), both(flags, files["other"])) == (of_own, of_other)
    renamed = tmp_path / "digits.safetensors"  # the same classes, of other data
    about = {**metadata_of(digits / "model.safetensors"), "data": "folder"}
    save_file(load_file(digits / "model.safetensors"), renamed, metadata=about)
    assert both([*DIGITS, "--steps", "1", "--lr", "0"], renamed) == ""

    flags = [*small, "--data_dir", "gone", "--init", str(files["own"]), "--dry_run"]
    assert main([*flags, "--out", str(tmp_path / "none")]) == 0
    unless = "53 of 55 entries are from {}; made anew, unless the data, not known here, have the "
    unless += "classes of the file: head.weight, head.bias"
    assert unless.format(files["own"]) in capsys.readouterr().out


def metadata_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_facebooks_file_of_deit3_gives_every_weight(tmp_path, monkeypatch):
    """LayerScale is gamma_1 and gamma_2 of a block there (deit/models_v2.py), which was made anew
    at 1e-4, without which a network is hardly more than its patches."""
    size = Size(patch=2, dim=16, depth=2, heads=2, class_token=True, layer_scale=1e-4)
    monkeypatch.setitem(SIZES, "deit3_small_images", size)
    monkeypatch.setattr(results, "_draw", lambda out: "")
    torch.manual_seed(3)
    own = models.create("deit3_small_images", num_classes=10, image_shape=(1, 8, 8)).state_dict()
    own = {name: torch.randn_like(weight) for name, weight in own.items()}
    theirs = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): weight
        for name, weight in as_timm(own, size)[0].items()
    }
    assert {"blocks.1.gamma_2", "patch_embed.proj.weight", "cls_token"} < theirs.keys()
    torch.save({"model": theirs}, tmp_path / "deit_3_small_224_1k.pth")
    flags = ["--model", "deit3_small_images", "--init", str(tmp_path / "deit_3_small_224_1k.pth")]
    assert main([*DIGITS, *flags, "--steps", "1", "--lr", "0", "--out", str(tmp_path / "run")]) == 0
    got = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(got[name], weight) for name, weight in own.items())
    assert "init: 36 of 36 entries" in log(tmp_path / "run")
    assert "warning: init" not in log(tmp_path / "run")


class Evil:
    def __reduce__(self):
        return print, ("evil",)


def test_what_is_no_file_of_weights_is_one_sentence(tmp_path, capsys):
    torch.save({"model": {"head.weight": torch.zeros(1)}, "args": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("text")
    (tmp_path / "cut.safetensors").write_text("text")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    wrong = {
        "evil.pth": "of tensors alone that torch.save wrote, got",
        "text.pth": "of tensors alone that torch.save wrote, got",
        "list.pth": "with tensors by name, got",
        "other.pth": "with 0% of the parameters of this ViT, no pos_embed but a instead of shape",
        "gone": "which does not exist",
        ".": "which holds no weights",
        "cut.safetensors": "cannot be read",
    }
    for name, text in wrong.items():
        flags = ["--steps", "1", "--out", str(tmp_path / "run"), "--init", str(tmp_path / name)]
        code = main([*DIGITS, *flags])
        said = capsys.readouterr()
        assert code == (1 if name.startswith("cut") else 2) and text in said.err, (name, said.err)
        assert said.err.count("\n") == 1 and "evil\n" not in said.out
    assert not (tmp_path / "run").exists()


def test_a_resume_keeps_what_is_frozen(digits, tmp_path, capsys):
    flags = ["--steps", "40", "--ema", "0.8", "--out", str(digits), "--resume", "auto", "--dry_run"]
    assert main([*DIGITS, *flags, "--freeze", "norm", "--init", "gone"]) == 2
    assert "freeze must be as in the checkpoint" in capsys.readouterr().err
    assert main([*DIGITS, *flags, "--layer_decay", "0.9", "--init", "gone"]) == 0
    said = capsys.readouterr().out
    assert "layer_decay is 0.9, was 1.0" in said and "init:" not in said


@pytest.fixture
def timm(monkeypatch):
    """A timm of one model, whose weights were trained on other pixels; it has none for another."""

    def create_model(name, **how):
        if name == "empty":
            raise RuntimeError("no pretrained weights\nexist")
        model = models.create("vit_8", num_classes=10, image_shape=(1, 8, 8))
        model.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}
        return model

    fake = types.ModuleType("timm")
    fake.__version__, fake.create_model = "1", create_model  # type: ignore[attr-defined]
    fake.is_model = {"own", "empty"}.__contains__  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", fake)


def test_timms_weights_come_by_name(timm, tmp_path, capsys, monkeypatch):
    def start(name, *flags):
        flags = ["--steps", "1", "--out", str(tmp_path / "run"), "--init", f"timm:{name}", *flags]
        return main([*DIGITS, *flags]), capsys.readouterr()

    code, said = start("own", "--dry_run")
    assert code == 0 and "init: timm:own, which --dry_run does not fetch" in said.out
    assert start("own")[0] == 0
    text = log(tmp_path / "run")
    assert "init: 55 of 55 entries are from timm:own" in text
    assert "warning: init: timm:own was trained on pixels of mean and std ((0.5,), (0.5,))" in text
    code, said = start("empty")
    assert code == 2 and "got no pretrained weights exist; fetch them" in said.err
    code, said = start("none")
    assert code == 2 and "a model of the installed timm" in said.err
    monkeypatch.setitem(sys.modules, "timm", None)
    code, said = start("own")
    assert code == 2 and "timm is not installed here" in said.err


@pytest.mark.parametrize("on", ["ddp", "zero --zero_stage 2", "zero --zero_stage 3", "fsdp2"])
def test_the_plan_keeps_frozen_weights_without_gradients_or_state(on, capsys):
    def planned(*flags):
        flags = ["--model", "vit_b16", "--gpus", "8", "--json", "--backend", *on.split(), *flags]
        assert main(["plan", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    whole, head = planned(), planned("--freeze", "^(?!head)")
    assert whole["parameters"] == head["parameters"]
    more, less = whole["memory"], head["memory"]
    assert less["weights"] == pytest.approx(more["weights"], rel=0.02)
    for name in ("base_state", "g_v", "masters"):
        assert less[name] < 0.02 * more[name] or more[name] == 0, name
    assert less["peak"] < more["peak"]


@pytest.mark.parametrize(
    "flag, value, text",
    [
        ("layer_decay", "0", "layer_decay must be in (0, 1], got 0.0"),
        ("layer_decay", "1.1", "layer_decay must be in (0, 1], got 1.1"),
        ("head_lr", "0", "head_lr must be > 0 and finite, got 0.0"),
        ("freeze", "(", "freeze must be a regular expression of names of parameters, got '('"),
    ],
)
def test_values_out_of_range_are_one_sentence(flag, value, text, tmp_path, capsys):
    assert main([*DIGITS, f"--{flag}", value, "--out", str(tmp_path / "run")]) == 2
    assert text in capsys.readouterr().err
