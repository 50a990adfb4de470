"""timm's ViT-Ti through the whole product: every backend starts from the file, scores and predicts
as timm does, and gives the file back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from dist_looksam.cli.main import main
from dist_looksam.data.card import of_metadata
from dist_looksam.measure.prediction import pixels
from launch import play_trains

pytestmark = pytest.mark.needs("deepspeed", "timm")

SIDE, CLASSES = 32, ("cat", "dog", "fish")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which --data folder takes
ON = {
    "ddp": ["--backend", "ddp"],
    "zero3": ["--backend", "zero", "--zero_stage", "3"],
    "fsdp2": ["--backend", "fsdp2"],
}
# One step with lr 0, so that what the run evaluates and leaves is what it started from.
FLAGS = ["--data", "folder", "--image_size", str(SIDE), "--batch_size", "6", "--steps", "1"]
FLAGS += ["--optimizer", "sgd", "--lr", "0", "--augment", "none", "--device", "cpu"]
FLAGS += ["--workers", "1", "--micro_batch", "3"]


@pytest.fixture(scope="module")
def theirs():
    """Its LayerNorms, biases and head are random, too, so that each of them counts."""
    import timm

    torch.manual_seed(2)
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, num_classes=len(CLASSES))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """Pictures, the file, and a run by each of ON."""
    place, random = tmp_path_factory.mktemp("timm"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            (place / "data" / split / name).mkdir(parents=True)
            for number in range(2):
                levels = random.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
                Image.fromarray(levels).save(place / "data" / split / name / f"{number}.png")
    save_file(theirs.state_dict(), place / "vit_ti.safetensors")
    flags = [*FLAGS, "--data_dir", str(place / "data"), "--init", str(place / "vit_ti.safetensors")]
    cases = [[*flags, "--model", "deit_ti16", *ON[on], "--out", str(place / on)] for on in ON]
    play_trains(place, {2: cases}, 600)
    for model in ("deit_ti16", "vit_tiny_patch16_224"):
        own = ["train", *flags, "--model", model, "--out", str(place / model)]
        assert main(own) == 0
    return place


def pictures(folder):
    return sorted((folder / "data" / "val").glob("*/*.png"))


@pytest.fixture(scope="module")
def logits(theirs, folder):
    """timm's, of the evaluation pictures."""
    with safe_open(folder / "deit_ti16" / "model.safetensors", framework="pt") as file:
        card = of_metadata(file.metadata())
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    images = [(pixels(path, card) / 255 - mean) / std for path in pictures(folder)]
    with torch.no_grad():
        found = theirs(torch.stack(images)).double()
    assert found.std() > 0.1
    return found


def labels_of(logits):
    return torch.arange(len(logits)) // 2


def loss_of(logits):
    return F.cross_entropy(logits, labels_of(logits))


@pytest.mark.parametrize("on", [*ON, "deit_ti16"])
def test_every_backend_starts_from_timms_weights_to_the_bit_and_scores_as_timm(
    folder, logits, theirs, on
):
    got, want = load_file(folder / on / "model.safetensors"), theirs.state_dict()
    assert "init: 152 of 152 entries are from" in (folder / on / "log.txt").read_text()
    for name, weight in got.items():
        other = want[name.replace("fc", "mlp.fc").replace("patch_embed.", "patch_embed.proj.")]
        assert torch.equal(weight, other.reshape(weight.shape)), name
    assert len(got) == len(want)
    rows = map(json.loads, (folder / on / "metrics.jsonl").read_text().splitlines())
    (loss,) = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert loss == pytest.approx(float(loss_of(logits)), abs=1e-5)


@pytest.mark.parametrize("model", ["deit_ti16", "vit_tiny_patch16_224"])
def test_eval_and_predict_have_timms_logits_to_1e5(folder, logits, model, capsys):
    """Logits up to a constant, which is what probabilities tell."""
    run, want = folder / model, logits.log_softmax(-1)
    capsys.readouterr()
    assert main(["predict", str(run), *map(str, pictures(folder)), "--top", "3", "--json"]) == 0
    for row, wanted in zip(json.loads(capsys.readouterr().out)["predictions"], want, strict=True):
        named = {entry["class"]: entry["probability"] for entry in row["classes"]}
        got = torch.tensor([named[name] for name in CLASSES], dtype=torch.float64).log()
        assert float((got - wanted).abs().max()) < 1e-5
    assert main(["eval", str(run), "--json"]) == 0
    found, right = json.loads(capsys.readouterr().out), logits.argmax(-1) == labels_of(logits)
    assert found["loss"] == pytest.approx(float(loss_of(logits)), abs=1e-5)
    assert found["top1"] == float(right.double().mean())


def test_export_gives_timms_own_file_back_and_both_are_scored(
    folder, theirs, logits, tmp_path, capsys
):
    """Names of timm's were refused there."""
    file = tmp_path / "again.safetensors"
    assert main(["checkpoint", "export", str(folder / "deit_ti16"), str(file), "--timm"]) == 0
    got, want = load_file(file), theirs.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[n], w) for n, w in want.items())
    data, loss = ["--data_dir", str(folder / "data")], float(loss_of(logits))
    named = ["--model", "deit_ti16", "--data", "folder", "--image_size", str(SIDE)]
    for weights, more in ((file, []), (folder / "vit_ti.safetensors", named)):
        capsys.readouterr()
        assert main(["eval", str(weights), *data, *more, "--json"]) == 0
        got = json.loads(capsys.readouterr().out)
        assert got["loss"] == pytest.approx(loss, abs=1e-5) and got["images"] == len(logits)
