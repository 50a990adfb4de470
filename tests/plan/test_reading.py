"""What a node must read, and how many cores that takes, in plan, dry run and recipes."""

import re
import sys
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest

from dist_looksam import plan as planning
from dist_looksam import project
from dist_looksam.cli.main import main
from dist_looksam.errors import ConfigError
from dist_looksam.plan import machine, machines
from dist_looksam.plan.reading import reading
from dist_looksam.run import recipes
from dist_looksam.settings import config

sys.path.append(str(Path(__file__).parents[1] / "data"))
from pictures import samples, write_shard

FLAGS = ["--model", "vit_b16", "--batch_size", "4096", "--precision", "bf16", "--optimizer", "sgd"]


def planned(core: float | None = None, *flags: str):
    settings = config.parse(["--data", "folder", "--data_dir", "x", *FLAGS, *flags])
    own = replace(machine("h200"), images_per_second_per_core=core)
    return planning.plan(settings, gpus=32, machine=own, gpus_per_node=8)


def test_a_node_reads_its_share_of_the_images_at_their_mean_size():
    plan = planned(core=700.0)
    assumed, measured = reading(plan), reading(plan, 50_000)
    assert assumed.images_per_s == pytest.approx(plan.images_per_s / 4)
    assert assumed.bytes_per_s == pytest.approx(plan.images_per_s / 4 * 110_000)
    assert assumed.cores == ceil(plan.images_per_s / 4 / 700)
    assert "110 kB an image (assumed); " in str(assumed) and str(measured).count("assumed") == 0
    assert measured.bytes_per_s == pytest.approx(plan.images_per_s / 4 * 50_000)
    assert reading(planned()).cores is None and "cores" not in str(reading(planned()))


def test_a_machine_file_holds_what_a_core_decodes(tmp_path, capsys):
    file = tmp_path / "m.yaml"
    machines.save(machine("h200"), file)
    assert "cores decode" not in page(file, capsys)
    text = file.read_text().replace("per_core: null", "per_core: 718.5")
    file.write_text(text)
    assert machines.load(file).images_per_second_per_core == 718.5
    assert re.search(
        r"To be read: [\d,]+ images/s and .*; \d+ cores decode them\.", page(file, capsys)
    )
    file.write_text(text.replace("718.5", "0"))
    with pytest.raises(ConfigError, match=r"images_per_second_per_core of machine .* above 0"):
        machines.load(file)
    file.write_text(text.replace("images_per_second_per_core: 718.5\n", ""))
    assert machines.load(file) == machine("h200")  # files from before it


def page(file: Path, capsys) -> str:
    capsys.readouterr()
    assert main(["plan", "--gpus", "32", "--machine", str(file), *FLAGS]) == 0
    return capsys.readouterr().out


def test_a_dry_run_takes_the_size_of_the_images_from_the_index(tmp_path, capsys):
    for n in range(2):
        write_shard(tmp_path / f"train-{n}.tar", samples(0, 1, 0, first=3 * n))
    write_shard(tmp_path / "val-0.tar", samples(1, 0))
    assert main(["data", "index", str(tmp_path)]) == 0
    size = sum(path.stat().st_size for path in tmp_path.glob("train-*.tar")) / 6
    flags = ["--data", "tar", "--data_dir", str(tmp_path), "--dry_run", "--ranks", "16", *FLAGS]
    capsys.readouterr()
    assert main(["train", *flags]) == 0
    said = capsys.readouterr().out
    assert f"at {size / 1e3:,.0f} kB an image\n" in said and "to read " in said
    assert main(["train", "--data", "digits", "--dry_run", "--ranks", "2"]) == 0
    assert "to read " not in capsys.readouterr().out


def test_recipes_say_what_a_node_reads():
    path = project.RECIPES / "vit_b16-adamw-4k.yaml"
    row = recipes._row(path, outcome := recipes.checked(path))
    assert recipes._COLUMNS[-2] == "MB/s a node" and row[-1] == "-"
    assert int(row[-2].replace(",", "")) == round(outcome.plan.images_per_s / 8 * 0.11)


def test_plan_dry_run_and_recipes_take_the_cores_of_one_machine_file(tmp_path, capsys, monkeypatch):
    """The file that `dist-looksam data bench --write` writes."""
    file = tmp_path / "m.yaml"
    monkeypatch.setenv(machines.FILE, str(file))
    own = replace(machine("v100"), images_per_second_per_core=1000.0)
    recipe = str(project.RECIPES / "vit_b16-adamw-4k.yaml")
    asks = (
        ["plan", "--gpus", "32", *FLAGS],
        ["train", "--config", recipe, "--dry_run"],
    )
    limit = r"(\d+) cores would decode them, but it has 4: decoding is the limit, at (\d+)% of"
    for there, says in ((96, r"; (\d+) of its 96 cores decode them"), (4, limit)):
        machines.save(replace(own, cores_per_node=there), file)
        for argv in asks:
            assert main(argv) == 0
            said = capsys.readouterr().out
            needed = ceil(int(re.search(r"([\d,]+) images/s and", said)[1].replace(",", "")) / 1000)
            found = re.search(says, said)
            assert int(found[1]) == needed and found.groups()[1:] in ((), (f"{400 / needed:.0f}",))
    assert "v100" not in said  # only the cores are of the file
    assert main(["recipes", "list", recipe]) == 0
    heads, first, *_ = capsys.readouterr().out.splitlines()
    assert heads.endswith("cores a node") and int(first.split()[-1]) == needed
    file.write_text(file.read_text().replace("cores_per_node: 4", "cores_per_node: 1.5"))
    with pytest.raises(ConfigError, match=r"cores_per_node of machine .* whole number above 0"):
        machines.load(file)
