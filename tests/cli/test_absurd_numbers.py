"""Numbers that no machine has, in the flags of bench, plan, sweep and cost: one sentence, exit 2.

They ended in tracebacks of torch (--batch_size 1e21, --classes 1e21), ran for ever (--k 2147483647)
or were planned with (--bandwidth 1e300, "inf Gbit/s").
"""

import pytest

from dist_looksam.cli import main as cli

HUGE = str(10**21)
WHOLE = ("0", "-1", HUGE, "2147483647")
REAL = ("0", "-1", HUGE, "nan", "inf", "1e-320", "1e300")
PLAN = ["plan", "--model", "vit_8", "--batch_size", "64", "--gpus", "2"]
BENCH = ["bench", "--model", "vit_8", "--optimizers", "sgd", "--repeats", "1"]
SWEEP = ["sweep", "no.yaml", "--dry_run"]
COST = ["cost", "--data", "digits", "--model", "vit_8", "--optimizer", "look_sam"]
CASES = [
    *((BENCH, flag, v) for flag in ("batch_size", "micro_batch", "k", "repeats") for v in WHOLE),
    *((PLAN, flag, v) for flag in ("gpus", "gpus_per_node", "samples", "classes") for v in WHOLE),
    *((PLAN, flag, v) for flag in ("mfu", "bandwidth", "latency") for v in REAL),
    *((SWEEP, flag, v) for flag in ("jobs", "ranks") for v in WHOLE),
    *((SWEEP, "at_once", v) for v in WHOLE[1:]),
    *((COST, flag, v) for flag in ("batch_size", "micro_batch", "k") for v in WHOLE[:3]),
    *((COST, flag, v) for flag in ("rho", "alpha", "lr") for v in ("-1", "nan", "inf", "1e300")),
]


@pytest.mark.parametrize("command, flag, value", CASES, ids=lambda part: str(part)[:12])
def test_an_absurd_number_is_a_sentence_that_names_the_flag(command, flag, value, capsys):
    assert cli.main([*command, f"--{flag}", value]) == 2
    told = capsys.readouterr()
    lines = told.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and not told.out
    names = {"samples": ("samples", "steps"), "classes": ("classes", "memory")}.get(flag, (flag,))
    assert any(name in lines[0] for name in names)


@pytest.mark.parametrize("device", ["foo", "cuda:99", "cpu:3", "meta"])
def test_a_device_that_is_not_here_is_a_sentence(device, capsys):
    assert cli.main([*BENCH, "--device", device]) == 2
    assert f"got {device}" in capsys.readouterr().err


def test_a_batch_that_no_memory_holds_is_a_sentence(capsys):
    argv = ["bench", "--model", "vit_b16", "--batch_size", "9000000"]
    assert cli.main(argv) == 2
    assert "batch_size must fit into" in capsys.readouterr().err


def test_a_file_that_cost_cannot_write_is_refused_before_it_measures(tmp_path, capsys):
    assert cli.main([*COST, "--json", str(tmp_path / "none" / "x.json")]) == 2
    assert "json must be a file" in capsys.readouterr().err
