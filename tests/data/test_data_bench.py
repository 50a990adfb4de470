import json
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest

from dist_looksam.cli.main import main
from dist_looksam.data import jpeg
from dist_looksam.data.loader import cores
from dist_looksam.plan import machine, machines
from dist_looksam.plan.commands import of_flags


def test_bench_measures_both_routes_and_says_what_a_node_needs(tree: Path, needs, capfd):
    needs("jpeg_in_c", "simplejpeg")
    flags = ["data", "bench", str(tree), "--image_size", "32", "--images", "64"]
    assert main([*flags, "--images_per_s", "1e6", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert list(found["routes"]) == ["C", "Python"]
    for speed in found["routes"].values():
        assert 0 < speed["least"] <= speed["images_per_s"] <= speed["most"]
        assert speed["mb_per_s"] > 0
    rate = found["routes"]["C"]["images_per_s"]
    assert found["node"]["cores"] == -(-(10**6) // rate)
    assert main([*flags, "--augment", "3augment,jitter,erasing"]) == 0
    told = capfd.readouterr().out
    assert "images/s a core" in told
    assert "made on the device and not in these numbers: erasing\n" in told
    assert main([*flags, "--augment", "3augment,mixup", "--augment_on", "device"]) == 0
    said = "made on the device and not in these numbers: policy and jitter, mixing\n"
    assert said in capfd.readouterr().out
    assert main([*flags, "--augment_on", "device"]) == 2
    assert "augment_on device needs" in capfd.readouterr().err


def test_bench_says_what_a_plan_needs_and_keeps_the_speed_in_a_machine_file(
    tree: Path, tmp_path: Path, capfd
):
    file = tmp_path / "m.yaml"
    machines.save(machine("v100"), file)
    flags = ["--model", "vit_b16", "--batch_size", "4096", "--gpus", "32", "--machine", str(file)]
    bench = ["data", "bench", str(tree), "--images", "8", "--image_size", "64"]
    assert main([*bench, *flags, "--write", str(file), "--json"]) == 0
    said = capfd.readouterr()
    found = json.loads(said.out)
    speed = next(iter(found["routes"].values()))["images_per_s"]
    plan = of_flags([*flags, "--image_size", "64", "--classes", "2", "--samples", "12"])
    assert found["node"]["images_per_s"] == pytest.approx(plan.images_per_s / 4)
    assert found["node"]["cores"] == ceil(plan.images_per_s / 4 / speed)
    assert f"DIST_LOOKSAM_MACHINE={file}" in said.err
    made = replace(machine("v100"), images_per_second_per_core=round(speed, 1))
    assert machines.load(file) == replace(made, cores_per_node=cores())
    assert main([*bench, *flags, "--images_per_s", "9"]) == 2
    assert "images_per_s is of the plan" in capfd.readouterr().err
    assert main([*bench, "--write", str(tmp_path / "no" / "m.yaml")]) == 2
    assert "write must name a file" in capfd.readouterr().err


def test_bench_measures_the_python_route_alone_where_there_is_no_other(
    tree: Path, monkeypatch, capfd
):
    from dist_looksam.data import decode

    monkeypatch.setenv(jpeg.SWITCH, "python")
    decode.route.cache_clear()
    try:
        assert (
            main(["data", "bench", str(tree), "--image_size", "32", "--images", "64", "--json"])
            == 0
        )
    finally:
        monkeypatch.undo()
        decode.route.cache_clear()
    assert list(json.loads(capfd.readouterr().out)["routes"]) == ["Python"]


@pytest.mark.parametrize(
    "flags", [["--images", "0"], ["--images_per_s", "-1"], ["--image_size", "0"]]
)
def test_a_wrong_number_is_one_sentence(tree: Path, flags: list[str], capfd):
    assert main(["data", "bench", str(tree), *flags]) == 2
    assert flags[0].strip("-") in capfd.readouterr().err


def test_damaged_files_alone_are_one_sentence(tree: Path, capfd):
    for path in (tree / "train").rglob("*.jpg"):
        path.write_bytes(b"no image")
    assert main(["data", "bench", str(tree)]) == 1
    assert "no image can be read" in capfd.readouterr().err
