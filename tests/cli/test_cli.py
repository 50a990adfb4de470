"""dist-looksam: one table of commands, each imported when it is called."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dist_looksam
from dist_looksam.cli import main as cli
from dist_looksam.cli import table
from dist_looksam.record.metrics import FIELDS

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "altair", "deepspeed", "sklearn", "rich", "pytorch_optimizer")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_row_names_a_function_that_takes_the_arguments(name):
    row = cli.COMMANDS[name]
    function = getattr(importlib.import_module(f"dist_looksam.{row.module}"), row.function)
    (parameter, *_) = inspect.signature(function).parameters.values()
    assert parameter.name == "argv"
    assert row.text and row.text[0].islower() and not row.text.endswith(".")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(argv, capsys):
    assert cli.main(argv) == 0
    told = capsys.readouterr().out
    for name, row in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(row.text)}$", told, re.M)


def test_the_help_of_train_names_print_config(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "--print_config" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "curves", "probe", "report", "bench", "world"])
def test_every_command_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--help"])
    assert left.value.code in (0, None)
    assert "usage:" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == dist_looksam.__version__


def test_a_command_that_is_not_called_is_not_imported():
    """Listing the commands must not wait for libraries of one of them."""
    code = f"import dist_looksam.cli.main, sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def run(tmp_path):
    """Enough of a run directory for both pictures."""
    steps = [dict.fromkeys(FIELDS, 0.5) | {"step": t, "look": t % 2 == 0} for t in range(6)]
    looks = [
        {"step": t, "g_norm": 1.0, "gs_norm": 1.1, "gh_norm": 1.0, "gv_norm": 0.4, "cos_theta": 0.9}
        | {f"{part}_change": 0.1 for part in ("gs", "gh", "gv")}
        for t in (0, 2, 4)
    ]  # fmt: skip
    for name, rows in (("metrics", steps), ("probe", looks)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def test_curves_draws_and_says_where(run, capsys):
    assert cli.main(["curves", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'curves.png'}\n"
    assert (run / "curves.png").stat().st_size > 1000
    assert not (run / "probe_change.png").exists()


def test_probe_draws_figures_1_and_2(run, capsys):
    assert cli.main(["probe", str(run)]) == 0
    assert (run / "probe_change.png").exists() and (run / "probe_norms.png").exists()
    assert capsys.readouterr().out.count(str(run)) == 4
    assert not (run / "curves.png").exists()


@pytest.mark.parametrize("command", [["recipes"], ["jobs", "."]])
def test_a_reader_that_has_seen_enough_is_no_error(command, tmp_path):
    """`dist-looksam recipes | head -1` ended in a traceback now and then."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("steps: 3\n")
    done = subprocess.Popen(
        [sys.executable, "-m", "dist_looksam.cli.main", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    done.stdout.close()
    assert (done.wait(timeout=120), done.stderr.read()) == (0, "")


def test_a_table_is_aligned_and_no_cell_of_it_is_wrapped_cut_or_read_as_markup():
    """rich's own tables break lines at 80 characters where the output is a pipe."""
    path = "runs/" + 300 * "x"
    text = table.text(["run", "[red]top1"], [[path, "1"], ["[b]", "100"]], indent="  ")
    lines = text.splitlines()
    assert [line.split() for line in lines] == [["run", "[red]top1"], [path, "1"], ["[b]", "100"]]
    assert lines[1].endswith("        1") and len({len(line) for line in lines}) == 1
    assert all(line.startswith("  ") for line in lines)
    assert table.text(["", ""], [["a", "1"]]) == "a  1"
