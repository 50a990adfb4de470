import json
import math
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_looksam.cli import main as cli
from dist_looksam.errors import ConfigError
from dist_looksam.report import curves, drawing, probe_figures
from dist_looksam.report.overlaid import overlaid

K = 5


def run(folder: Path, steps: int, *, looks: bool = True, evaluate: bool = True) -> Path:
    """The metrics.jsonl of a made-up run: a noisy falling loss, a cosine schedule, some trouble."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for t in range(steps):
        done, look = t / steps, looks and t % K == 0
        norm = (0.4 + 2.2 * math.exp(-7 * done)) * draw.lognormvariate(0, 0.25)
        skipped = t in (steps // 9, steps // 3)
        row = {
            "step": t,
            "epoch": int(done * 20),
            "loss": None if skipped else (0.25 + 2.05 * math.exp(-5 * done)) * draw.gauss(1, 0.12),
            "lr": 3e-3 * min(1, 12 * done) * 0.5 * (1 + math.cos(math.pi * done)),
            "grad_norm": None if skipped else norm * (40 if t == steps // 2 else 1),
            "update_norm": 0.01,
            "look": look,
            "skipped": skipped,
            "gv_norm": 0.15 * norm if looks else None,
            "gv_ratio": (0.3 - 0.15 * done) * draw.gauss(1, 0.05 + 0.1 * (not look))
            if looks and not skipped
            else None,
            "images_per_s": 3200.0,
            "seconds": t * 0.31,
        }
        lines.append(row)
        if evaluate and (t + 1) % max(1, steps // 20) == 0:
            top1 = 0.905 - 0.6 * math.exp(-6 * done) + draw.gauss(0, 0.004)
            loss = 0.32 + 1.6 * math.exp(-5 * done)
            lines.append({"step": t + 1, "eval_top1": top1, "eval_loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture
def without_altair(tmp_path):
    """An environment in whose Python altair cannot be imported, as after a bare pip install."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'altair':\n"
        "            raise ModuleNotFoundError('no altair', name='altair')\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    return os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}:{Path(__file__).parents[2]}"}


def command(env, *words):
    line = [sys.executable, "-m", "dist_looksam.cli.main", *map(str, words)]
    return subprocess.run(line, env=env, capture_output=True, text=True)


def test_without_the_extra_that_draws_a_run_trains_to_its_end_and_says_how_to_get_it(
    tmp_path, without_altair
):
    """Drawing is the last thing a run does: a missing library would end hours of it badly."""
    out = tmp_path / "run"
    flags = ["--data", "digits", "--steps", "3", "--batch_size", "64", "--device", "cpu"]
    done = command(without_altair, "train", *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "curves.png was not drawn: drawing needs altair" in done.stdout + done.stderr
    assert "pip install 'dist-looksam[report]'" in done.stdout + done.stderr
    assert (out / "summary.json").exists() and (out / "model.safetensors").exists()
    assert not (out / "curves.png").exists()


@pytest.mark.parametrize("name", ["curves", "probe", "report"])
def test_without_the_extra_commands_that_draw_are_one_sentence(name, tmp_path, without_altair):
    done = command(without_altair, name, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: drawing needs altair, vl-convert-python and jinja2")
    assert len(done.stderr.splitlines()) == 1


def probes(folder: Path, looks: int, *, eps: bool = True) -> Path:
    """The probe.jsonl of a made-up run in which g_v is small and moves little, as in the paper."""
    draw = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(looks):
        done = i / looks
        g = (0.5 + 1.5 * math.exp(-5 * done)) * draw.lognormvariate(0, 0.2)
        cos = min(0.999, 0.9 + 0.05 * done + draw.gauss(0, 0.01))
        gs = 1.15 * g
        row = {"step": i * K, "g_norm": g, "gs_norm": gs, "cos_theta": cos}
        row |= {"gh_norm": gs * cos, "gv_norm": gs * math.sqrt(1 - cos**2)}
        if i:
            for part, size in (("gs", 1.2), ("gh", 1.25), ("gv", 0.55)):
                row[f"{part}_change"] = row[f"{part}_norm"] * size * draw.gauss(1, 0.12)
        if eps:
            row["eps_cosine"] = 1 - 0.02 * draw.random()
        lines.append(row)
    (folder / "probe.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def size(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def inks(png: Path) -> set[tuple[int, int, int]]:
    from PIL import Image

    return {c for n, c in Image.open(png).convert("RGB").getcolors(1 << 24) if n > 40}


def rgb(text: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(text[1:]))  # type: ignore[return-value]


def test_curves_show_loss_accuracy_and_three_small_panels(tmp_path):
    path = curves(run(tmp_path / "a", 400))
    assert path == tmp_path / "a" / "curves.png"
    width, height = size(path)
    assert 1500 < width < 2600 and 1000 < height < 1600
    colours = {drawing.INK, drawing.GREEN, drawing.PURPLE, drawing.ORANGE}
    assert {rgb(c) for c in colours} <= inks(path)


def test_a_title_says_method_model_data_batch_and_seed_and_not_the_folder(tmp_path, monkeypatch):
    charts = []
    monkeypatch.setattr(drawing, "save_png", lambda chart, path: charts.append(chart.to_dict()))
    folder = run(tmp_path / "folders-name", 60)
    config = "optimizer: sam\nbase: lamb\nmodel: vit_8\ndata: digits\nbatch_size: 4096\nseed: 3\n"
    (folder / "config.yaml").write_text(config)
    curves(folder)
    title = charts[0]["title"]
    assert title["text"] == "sam on lamb, vit_8, digits"
    assert "batch 4,096  ·  seed 3" in title["subtitle"]
    assert "folders-name" not in json.dumps(charts[0])


def test_several_runs_are_one_picture_named_by_what_differs(tmp_path, monkeypatch, capsys):
    charts = []
    real = drawing.save_png
    monkeypatch.setattr(
        drawing, "save_png", lambda chart, path: charts.append(chart.to_dict()) or real(chart, path)
    )
    for method, k in (("sam", 1), ("look_sam", 5)):
        folder = run(tmp_path / method, 60)
        text = f"optimizer: {method}\nk: {k}\nmodel: vit_8\ndata: digits\nout: {folder}\n"
        (folder / "config.yaml").write_text(text)
    folders = [str(tmp_path / "sam"), str(tmp_path / "look_sam")]
    out = tmp_path / "both.png"
    assert cli.main(["curves", *folders, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and not (tmp_path / "sam/curves.png").exists()
    assert charts[0]["title"]["text"] == "2 runs: vit_8, digits"
    names = [f"{name}: nan in 2 steps, first at step 6" for name in ("sam, k 1", "look_sam, k 5")]
    for panel in charts[0]["hconcat"]:
        assert panel["encoding"]["color"]["scale"]["domain"] == names
        rows = charts[0]["datasets"][panel["data"]["name"]]
        assert {row["run"] for row in rows} == {*names}
    assert cli.main(["curves", *folders, "--out", "/no/where/x.png"]) == 2
    assert cli.main(["curves", *folders, "--out", str(tmp_path / "x.pdf")]) == 2
    assert not (tmp_path / "x.pdf").exists()  # it would be a PNG that no PDF viewer opens
    assert "out must be a file in a directory that can be written" in capsys.readouterr().err


def test_a_run_without_looks_and_evaluations_has_fewer_panels(tmp_path):
    with_all = size(curves(run(tmp_path / "a", 60)))
    without = size(curves(run(tmp_path / "b", 60, looks=False, evaluate=False)))
    assert without[0] < with_all[0]
    assert rgb(drawing.PURPLE) not in inks(tmp_path / "b" / "curves.png")


def test_the_schedule_is_drawn_on_a_linear_axis_and_all_panels_share_the_steps(
    tmp_path, monkeypatch
):
    """A cosine that ends near zero once came out as a logarithmic cliff."""
    charts = []
    monkeypatch.setattr(drawing, "save_png", lambda chart, path: charts.append(chart.to_dict()))
    curves(run(tmp_path, 60))
    upper, lower = (row["hconcat"] for row in charts[0]["vconcat"])
    scales = [panel["layer"][0]["encoding"]["x"]["scale"]["domain"] for panel in upper + lower]
    assert scales == [[0, 60]] * 5
    assert lower[0]["layer"][0]["encoding"]["y"]["scale"]["type"] == "linear"


def test_a_quantity_has_the_same_axis_in_every_run_and_the_last_accuracy_is_named(
    tmp_path, monkeypatch
):
    """g_v's axis was logarithmic where its values were wide, linear where not; and the best of
    many evaluations on the test images was written large, which is a choice made on them."""
    charts = []
    monkeypatch.setattr(drawing, "save_png", lambda chart, path: charts.append(chart.to_dict()))
    for scale in (1.0, 3.0):
        folder = run(tmp_path / str(scale), 60)
        rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            for name in ("gv_ratio", "grad_norm", "loss"):
                if row.get(name):  # as wide as its scale says
                    row[name] = row[name] ** scale
        if scale == 3.0:
            rows[-1]["eval_top1"] = 0.123  # far below the best
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        curves(folder)
    kinds = [
        [panel["layer"][0]["encoding"]["y"]["scale"].get("type") for panel in row["hconcat"]]
        for chart in charts
        for row in chart["vconcat"]
    ]
    assert kinds == [["linear", None], ["linear", "log", "log"]] * 2
    text = json.dumps(charts[1])
    assert "last 12.30%" in text and "best" not in text and "held-out" not in text


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_run_that_has_hardly_begun_can_be_drawn(tmp_path, steps):
    assert curves(run(tmp_path, steps)).exists()


def test_a_loss_that_is_nan_is_named_where_it_began_and_is_not_drawn_as_0(tmp_path, monkeypatch):
    charts = []
    monkeypatch.setattr(drawing, "save_png", lambda chart, path: charts.append(chart.to_dict()))
    folders = [run(tmp_path / name, 60) for name in "ab"]
    rows = [json.loads(x) for x in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["step"] >= 50:
            row["loss" if "loss" in row else "eval_loss"] = None
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    evaluations = sum("eval_loss" in row and row["step"] >= 50 for row in rows)
    curves(folders[1])
    panel = charts[0]["vconcat"][0]["hconcat"][0]
    also = f" and {evaluations} evaluation{'s' * (evaluations > 1)}"
    assert panel["title"] == f"Loss: nan in 12 steps{also}, first at step 6"
    dots = panel["layer"][0]["data"]
    values = dots["values"] if "values" in dots else charts[0]["datasets"][dots["name"]]
    assert len(values) == 48 and all(row["step"] < 50 and row["value"] > 0 for row in values)
    overlaid(folders, tmp_path / "both.png")
    names = charts[1]["hconcat"][0]["encoding"]["color"]["scale"]["domain"]
    assert [": nan in 12 steps" in name for name in names] == [False, True]


def test_a_run_whose_losses_are_all_lost_can_be_drawn(tmp_path):
    run(tmp_path, 3)
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lost = [r | ({"loss": None} if "loss" in r else {"eval_top1": None}) for r in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lost))
    assert curves(tmp_path).exists()


def test_long_runs_give_pictures_of_bounded_data(tmp_path, monkeypatch):
    """Every look is multiple of K: a stride over all steps might show none, or nothing else."""
    charts = []
    monkeypatch.setattr(drawing, "save_png", lambda chart, path: charts.append(chart.to_dict()))
    curves(run(tmp_path, 6_000))
    (panel, *_) = charts[0]["vconcat"][0]["hconcat"]
    datasets = charts[0].get("datasets", {})
    dots = panel["layer"][0]["data"]
    values = dots["values"] if "values" in dots else datasets[dots["name"]]
    kinds = [row["kind"] for row in values]
    assert kinds.count("look") == 900 and kinds.count("between looks") == 900
    assert len(json.dumps(charts[0])) < 1_500_000


def test_a_directory_without_a_run_is_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match=r"at least one step.*--out"):
        curves(tmp_path)
    assert cli.main(["curves", str(tmp_path)]) == 2


def test_probe_figures_are_two_pictures_and_two_pages(tmp_path):
    paths = probe_figures(probes(tmp_path, 120))
    assert [p.name for p in paths] == [
        "probe_change.png",
        "probe_change.html",
        "probe_norms.png",
        "probe_norms.html",
    ]
    assert size(paths[2])[0] > size(paths[0])[0] * 1.2  # three panels, two


def test_probe_pages_load_nothing_from_the_network(tmp_path):
    for page in probe_figures(probes(tmp_path, 10))[1::2]:
        text = page.read_text()
        assert "<script src" not in text and "<link" not in text and 'import "http' not in text
        assert len(text) > 300_000  # vega itself is inside


def test_the_perturbation_panel_is_left_out_where_it_was_not_recorded(tmp_path):
    with_it = probe_figures(probes(tmp_path / "a", 10))[2]
    without = probe_figures(probes(tmp_path / "b", 10, eps=False))[2]
    assert size(without)[0] < size(with_it)[0]


def test_relative_change_is_the_change_over_the_norm(tmp_path, monkeypatch):
    charts = []
    monkeypatch.setattr(drawing, "save_png", lambda chart, path: charts.append(chart.to_dict()))
    monkeypatch.setattr(drawing, "save_html", lambda chart, path: path)
    look = {"g_norm": 1, "gs_norm": 4, "gh_norm": 5, "gv_norm": 8, "cos_theta": 1}
    change = {"gs_change": 1, "gh_change": 10, "gv_change": 4}
    lines = [{"step": 0} | look, {"step": 5} | look | change]
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"st')
    probe_figures(tmp_path)
    drawn = json.dumps(charts[0])
    for part, value in (("g_s", 0.25), ("g_h", 2.0), ("g_v", 0.5)):
        assert json.dumps({"step": 5, "value": value, "part": part})[:-1] in drawn


def test_one_probed_look_is_too_few(tmp_path):
    with pytest.raises(ConfigError, match="at least two looks, got 1"):
        probe_figures(probes(tmp_path, 1))


def test_smoothing_keeps_a_constant_and_a_slope_in_the_middle():
    assert np.allclose(drawing.smoothed([3.0] * 50, window=9), 3)
    assert np.allclose(drawing.smoothed(list(range(100)), window=5)[20:-20], range(20, 80))


def test_one_spike_does_not_set_the_axis():
    assert drawing.domain([1.0] * 999 + [1e6])[1] < 10


def test_thinning_keeps_the_ends():
    kept = drawing.thinned(range(1000), 7)
    assert kept[0] == 0 and kept[-1] == 999 and len(kept) == 7
