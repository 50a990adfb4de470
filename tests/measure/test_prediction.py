"""`dist-looksam predict`: what a picture is, seen as the run's evaluations see it."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dist_looksam import models
from dist_looksam.cli.main import main
from dist_looksam.data import EvalLoader, load
from dist_looksam.run.train import main as train

pytestmark = pytest.mark.slow
spec = importlib.util.spec_from_file_location(
    "pictures", Path(__file__).parents[1] / "data" / "pictures.py"
)
pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictures)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on a folder of JPEGs of 80x60, and one on grey digits."""
    folder = tmp_path_factory.mktemp("runs")
    pictures.write_tree(folder / "set", train=8, val=3)
    both = ["--optimizer", "adamw", "--steps", "3", "--device", "cpu"]
    flags = ["--data", "folder", "--data_dir", str(folder / "set"), "--image_size", "16"]
    more = ["--batch_size", "8", "--workers", "0", "--out", str(folder / "rgb")]
    assert train([*both, *flags, *more]) == 0
    assert train([*both, "--data", "digits", "--out", str(folder / "grey")]) == 0
    return folder


def evaluated(weights: Path, data) -> torch.Tensor:
    """Probabilities of all evaluation images, in the order of the data."""
    model = models.create("auto", num_classes=data.num_classes, image_shape=data.shape).eval()
    model.load_state_dict(load_file(weights))
    loader = EvalLoader(data.test, micro_batch=400, rank=0, ranks=1, pin=False)
    with torch.no_grad():
        (logits,) = [models.call(model, batch.to("cpu").images, None) for batch in loader]
    loader.close()
    return logits.double().softmax(-1)


def predicted(capsys, *arguments: object) -> list[dict[str, float]]:
    capsys.readouterr()
    assert main(["predict", *map(str, arguments), "--json", "--device", "cpu", "--top", "10"]) == 0
    rows = json.loads(capsys.readouterr().out)["predictions"]
    return [{e["class"]: e["probability"] for e in row["classes"]} for row in rows]


def test_pictures_get_the_probabilities_of_the_runs_own_evaluation(runs, capsys, tmp_path):
    """Also with weights that name no pixels, for which the data are opened."""
    data = load("folder", runs / "set", image_size=16, augment="none")
    want = evaluated(runs / "rgb" / "model.safetensors", data)
    files = [data.test.path(i) for i in range(len(data.test))]
    bare = runs / "rgb" / "bare.safetensors"
    save_file(load_file(runs / "rgb" / "model.safetensors"), bare)
    for weights in (runs / "rgb", bare):
        for shares, row in zip(want.tolist(), predicted(capsys, weights, *files), strict=True):
            assert row == pytest.approx(dict(zip(("cat", "dog"), shares, strict=True)), abs=1e-6)
    assert len({round(share, 5) for share in want[:, 0].tolist()}) > 3  # pictures differ
    digits = load("digits", augment="none")
    want = evaluated(runs / "grey" / "model.safetensors", digits)[:4]
    files = []
    for i, image in enumerate(digits.test.images[:4]):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(image[0].numpy()).save(files[-1])
    for shares, row in zip(want.tolist(), predicted(capsys, runs / "grey", *files), strict=True):
        assert row == pytest.approx({str(d): share for d, share in enumerate(shares)}, abs=1e-6)
    assert main(["predict", str(runs / "grey"), *map(str, files), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    best = want.argmax(-1).tolist()
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == [str(d) for d in best]
    assert all(line.count(",") == 1 for line in lines)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "x.jpg, which cannot be read (No such file or directory)."),
        (b"no picture", "x.jpg (no image)."),
        (pictures.jpeg(1)[:300], "IMAGE must be a picture, got "),
    ],
)
def test_a_picture_that_cannot_be_read_is_one_sentence(runs, capsys, tmp_path, content, sentence):
    path, good = tmp_path / "x.jpg", runs / "set" / "val" / "cat" / "0.jpg"
    if content is not None:
        path.write_bytes(content)
    capsys.readouterr()
    assert main(["predict", str(runs / "rgb"), str(good), str(path)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1
    assert sentence in told.err and "x.jpg" in told.err
