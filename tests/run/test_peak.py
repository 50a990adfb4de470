"""MFU and peak memory, from the card's name to the tables."""

import csv
import json
from types import SimpleNamespace

import made_up
import pytest
import torch

from dist_looksam.plan.machines import dense_peak, device_of
from dist_looksam.record import jobs
from dist_looksam.record.metrics import MetricsLog, read
from dist_looksam.record.progress import Progress
from dist_looksam.report.comparison import report
from dist_looksam.run.peak import peak_share
from dist_looksam.run.train import main
from dist_looksam.settings import config


@pytest.mark.parametrize("card, precision, tera", [
    ("NVIDIA H200", "bf16", 989), ("NVIDIA H100 80GB HBM3", "fp16", 989),
    ("NVIDIA H100 80GB HBM3", "fp32", 67), ("NVIDIA A100-SXM4-80GB", "bf16", 312),
    ("NVIDIA A100-PCIE-40GB", "fp32", 19.5), ("Tesla V100-SXM2-32GB", "fp16", 125),
])  # fmt: skip
def test_the_peak_of_a_card_is_that_of_its_data_sheet(card, precision, tera):
    assert dense_peak(card, precision) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("card", [
    "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "Tesla V100-PCIE-16GB",
    "NVIDIA GeForce RTX 4090", "cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb",  # parts of a card: seven times less
])  # fmt: skip
def test_a_card_whose_peak_is_not_known_has_none(card):
    assert dense_peak(card, "bf16") is None


@pytest.mark.parametrize("card, name", [
    ("NVIDIA H100 80GB HBM3", "h100"), ("h100", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-40"),
    ("nvidia_a100_80gb_pcie", "a100"), ("Tesla V100-SXM2-32GB", "v100"), ("NVIDIA H200", "h200"),
    ("Tesla V100-PCIE-16GB", None), ("NVIDIA H100 NVL", None), ("gh200", None), ("", None),
    ("nvidia_a100_80gb_pcie_1g.10gb", None), ("NVIDIA H100 96GB", None),
])  # fmt: skip
def test_a_plan_knows_a_card_by_its_name_only_with_the_memory_of_the_name(card, name):
    found = device_of(card)
    assert (found and found.name) == name


def share(
    monkeypatch, card: str, device: str = "cuda", ranks: int = 2, flags: str = "", step: int = 0
) -> float | None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    asked = f"--data folder --data_dir DIR --model vit_b16 --precision bf16 {flags}"
    settings = config.parse(asked.split())
    side = settings.image_size or 224
    data = SimpleNamespace(num_classes=1000, shape=(3, side, side))
    found = peak_share(settings, data, torch.device(device), ranks=ranks)
    return found and found(step)


def test_the_share_of_an_image_is_three_forwards_over_the_peak_of_all_ranks(monkeypatch):
    """A forward of ViT-B/16 takes 34.9 GFLOP (17.5 G multiply-adds)."""
    got = share(monkeypatch, "NVIDIA H200")
    assert got == pytest.approx(3 * 34.9e9 / (2 * 989e12), rel=0.01)
    assert share(monkeypatch, "NVIDIA H200", ranks=1) == pytest.approx(2 * got)


def test_where_images_grow_the_model_is_that_of_their_last_size(monkeypatch):
    """`auto` was another network at the small sizes, and the share six times too low."""
    sizes = "--image_size 128 --image_size_from 32 --steps 70 --model"
    auto, named = (
        share(monkeypatch, "NVIDIA H200", flags=f"{sizes} {x}") for x in ("auto", "vit_s16")
    )
    assert auto == named


def test_where_images_grow_the_share_is_that_of_the_size_of_the_step(monkeypatch):
    """ViT-B/16 at 128 pixels takes 11.2 GFLOP: 64 tokens. Seven sizes in 70 steps."""
    whole = share(monkeypatch, "NVIDIA H200")
    sizes = {"flags": "--image_size_from 128 --steps 70"}
    assert share(monkeypatch, "NVIDIA H200", **sizes, step=60) == whole
    for step in (0, 9):
        small = share(monkeypatch, "NVIDIA H200", **sizes, step=step)
        assert small == pytest.approx(3 * 11.2e9 / (2 * 989e12), rel=0.01)
    assert small < share(monkeypatch, "NVIDIA H200", **sizes, step=10) < whole


def test_there_is_no_share_on_a_cpu_or_an_unknown_card(monkeypatch):
    assert share(monkeypatch, "NVIDIA H200", device="cpu") is None
    assert share(monkeypatch, "a new one") is None


def test_a_look_counts_twice_in_the_mfu_of_its_line(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("dist_looksam.record.metrics.time.monotonic", lambda: now[0])
    with MetricsLog(tmp_path / "metrics.jsonl", peak_share=lambda step: 0.01) as log:
        for step in range(2):
            now[0] += 2
            log.step(step, images=20, look=step == 0)
    assert [row["mfu"] for row in read(tmp_path / "metrics.jsonl")[0]] == [0.2, 0.1]


def test_without_a_known_peak_the_lines_have_null(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.step(0, images=20, look=True)
    (row,) = read(tmp_path / "metrics.jsonl")[0]
    assert row["mfu"] is None and row["peak_memory"] is None and row["images_per_s"] > 0


def test_progress_shows_mfu_and_peak_memory_where_there_are_some(capsys):
    with Progress(10) as p:
        p.update(10, loss=1.0, images_per_s=100.0, mfu=0.3812, peak_memory=37 * 2**30)
    assert "images/s 100 MFU 38.1% GiB 37.0" in capsys.readouterr().out
    with Progress(10) as p:
        p.update(10, loss=1.0, images_per_s=100.0, mfu=None, peak_memory=None)
    said = capsys.readouterr().out
    assert "MFU" not in said and "GiB" not in said


def test_jobs_and_reports_show_both_and_older_runs_have_none(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    for seed, path in enumerate((new, old)):
        made_up.run(path, "look_sam", seed=seed)
    summary = json.loads((new / "summary.json").read_text())
    summary |= {"mfu": 0.38, "peak_memory": 5 * 2**30}
    (new / "summary.json").write_text(json.dumps(summary))
    rows = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"mfu": 0.38, "peak_memory": 5 * 2**30} for row in rows]
    (new / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {path.name: jobs.row_of(path) for path in (new, old)}
    assert [table["new"][c] for c in ("mfu", "GiB")] == ["38.0%", "5.0"]
    assert [table["old"][c] for c in ("mfu", "GiB")] == ["-", "-"]
    report([str(tmp_path)], out=tmp_path / "out")
    with open(tmp_path / "out" / "report.csv") as file:
        found = {row["folder"].split("/")[-1]: row for row in csv.DictReader(file)}
    assert (found["new"]["mfu"], found["new"]["peak_memory"]) == ("0.38", str(5 * 2**30))
    assert (found["old"]["mfu"], found["old"]["peak_memory"]) == ("", "")


def test_a_run_writes_the_mfu_of_its_lines_and_of_its_whole_time(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_looksam.run.fit.peak_share", lambda *a, **k: lambda step: 1e-4)
    flags = "--data digits --optimizer look_sam --k 2 --batch_size 64 --steps 4 --device cpu"
    assert main([*flags.split(), "--model", "vit_8", "--out", str(tmp_path)]) == 0
    for row in read(tmp_path / "metrics.jsonl")[0]:
        passes = 2 if row["step"] % 2 == 0 else 1
        assert row["mfu"] == pytest.approx(row["images_per_s"] * passes * 1e-4, rel=1e-2)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mfu"] == pytest.approx(summary["images_per_s"] * 1.5 * 1e-4, rel=1e-2)
    assert summary["peak_memory"] is None
