"""Bench: what it counts is what was done, and its ratios are of cycles of the same turn."""

import json
import os
import subprocess
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from dist_looksam.backends.compiled import compile_blocks
from dist_looksam.cli import main as cli
from dist_looksam.errors import ConfigError
from dist_looksam.measure import bench, loops
from dist_looksam.measure.bench import Counted, CycleTime, Loop, Problem, compare
from dist_looksam.optim.table import METHODS

pytestmark = pytest.mark.slow

SMALL = {"model": "vit_8", "batch_size": 8, "micro_batch": 4, "precision": "fp32", "device": "cpu"}


def test_passes_are_counted_where_they_happen():
    """With any m; msam and methods without ascent are measured without it."""
    costs = compare(Problem(k=5, m=4, **SMALL), list(METHODS), repeats=1)
    passes = {c.optimizer: c.passes_per_step for c in costs}
    assert passes == {
        "sgd": 1.0, "adamw": 1.0, "lamb": 1.0, "lars": 1.0, "sam": 2.0, "sam_k": 1.2,
        "look_sam": 1.2, "layer_sam": 2.0, "look_layer_sam": 1.2, "gsam": 2.0, "msam": 1.0,
    }  # fmt: skip
    assert {c.optimizer: c.base for c in costs} == {n: row.base for n, row in METHODS.items()}


@pytest.mark.needs("pytorch_optimizer")
def test_the_other_looksam_makes_two_passes_on_every_step():
    """Its k spares the perturbation and not the gradient; docs/planning.md says so."""
    theirs = [name for name, peer in bench.PEERS.items() if peer.library == "pytorch_optimizer"]
    costs = compare(Problem(k=5, **SMALL), theirs, repeats=1)
    assert [c.passes_per_step for c in costs] == [1.0, 2.0, 2.0]
    assert [c.base for c in costs] == ["lamb", "adamw", "adamw"]


@pytest.mark.needs("timm")
def test_timms_own_optimizers_are_measured_against_their_bases():
    costs = compare(Problem(k=2, **SMALL), ["timm.Lamb", "timm.AdamW"], repeats=1)
    assert [(c.base, c.passes_per_step) for c in costs] == [("lamb", 1.0), ("adamw", 1.0)]


def test_a_peer_that_cannot_run_here_is_a_sentence_and_left_out_of_all_with_a_line(monkeypatch):
    peers = {
        "a.SAM": loops.Peer("no_such_library", "SAM", "adamw"),
        "b.Lamb": loops.Peer("deepspeed", "FusedLamb", "lamb", on_cpu=False),
        "c.Lamb": loops.Peer("json", "Lamb", "lamb"),
        "d.AdamW": loops.Peer("torch.optim", "AdamW", "adamw"),
    }
    for module in (bench, loops):
        monkeypatch.setattr(module, "PEERS", peers)
    assert bench._names("all", "plain", "cpu")[len(METHODS) :] == ["d.AdamW"]
    reasons = {
        "a.SAM": "needs no_such_library, which is not installed",
        "b.Lamb": "needs a GPU, got device cpu",
        "c.Lamb": "needs json, which fails here "
        "(AttributeError: module 'json' has no attribute 'Lamb')",
    }
    assert bench._left_out("cpu") == [f"left out: {n} ({why})" for n, why in reasons.items()]
    for name, reason in reasons.items():
        with pytest.raises(ConfigError) as error:
            Problem(k=2, **SMALL).peer(name)
        assert str(error.value) == f"{name} {reason}; leave it out."


def test_a_ratio_is_to_the_base_in_the_same_turn():
    """Turn by turn 2, 3 and 2, though the machine was ten times slower in one of them."""
    loop = Loop(name="sam", base="adamw", step=lambda: None, counted=Counted())
    loop.counted.backwards = 30
    base = [CycleTime(seconds=t, cpu_seconds=1.0) for t in (0.1, 1.0, 0.1)]
    own = [CycleTime(seconds=t, cpu_seconds=2.0) for t in (0.2, 3.0, 0.2)]
    problem = Problem(k=5, **{**SMALL, "batch_size": 4})  # 15 backwards in three turns
    cost = bench._cost(loop, own, base, problem)
    assert cost.ratio == 2.0 and cost.cpu_ratio == 2.0
    assert (cost.ratio_low, cost.ratio_high) == (2.0, 3.0)
    assert cost.ms_per_step == 200.0 and cost.passes_per_step == 2.0
    assert cost.images_per_s == 20.0  # 4 in 0.2 s, the median
    assert cost.mfu is None and cost.launches is None


def test_every_loop_starts_from_the_same_weights_and_steps_as_its_base_does(monkeypatch):
    """The engine's adamw and the bare loop's end at the same weights: nothing is left out."""
    problem, models, new = Problem(k=2, **SMALL), [], Problem._new

    def remembered(self, base, **how):
        model, optimizer = new(self, base, **how)
        models.append(model)
        return model, optimizer

    monkeypatch.setattr(Problem, "_new", remembered)
    for loop in (problem.bare("adamw"), problem.ours("adamw")):
        loop.cycle(2, problem.device)
    pairs = zip(*(m.parameters() for m in models), strict=True)
    assert all((a == b).all() for a, b in pairs)
    start = new(problem, "adamw")[0]
    assert not (start.head.weight == models[0].head.weight).all()


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    flags = ["--model", "vit_8", "--batch_size", "8", "--repeats", "2", "--k", "2"]
    argv = ["bench", *flags, "--optimizers", "adamw,look_sam", "--out", str(tmp_path / "new")]
    assert cli.main(argv) == 0
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines()] == [
        "optimizer", "adamw", "look_sam", "written:",
    ]  # fmt: skip
    found = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert found["flags"]["batch_size"] == 8 and found["torch"] and found["threads"]
    assert [row["optimizer"] for row in found["costs"]] == ["adamw", "look_sam"]
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in found["costs"])


def test_backends_are_measured_under_a_launcher(tmp_path):
    """Two ranks of ZeRO: rank 0 reports, images are those of both, the base is in the engine."""
    flags = ["--model", "vit_8", "--batch_size", "16", "--repeats", "1", "--k", "2"]
    flags += ["--backend", "zero", "--zero_stage", "2", "--device", "cpu", "--micro_batch", "4"]
    argv = ["bench", *flags, "--optimizers", "look_layer_sam", "--out", str(tmp_path)]
    start = ["torchrun", "--standalone", "--nproc_per_node", "2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*start, "dist_looksam.cli.main", *argv], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("look_layer_sam") == 1
    (row,) = json.loads((tmp_path / "bench.json").read_text())["costs"]
    assert (row["base"], row["passes_per_step"]) == ("lamb", 1.5)
    assert row["images_per_s"] == pytest.approx(16e3 / row["ms_per_step"], rel=1e-3)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--zero_stage", "1"], "backend plain is of one rank, got zero_stage 1"),
        (["--backend", "ddp", "--optimizers", "pytorch_optimizer.SAM"], "needs backend plain"),
        (["--backend", "ddp", "--micro_batch", "3"], "micro_batch"),
        (["--backend", "ddp", "--zero_stage", "1"], "zero_stage"),
    ],
)
def test_what_a_backend_cannot_measure_is_a_sentence(flags, sentence, capsys):
    assert cli.main(["bench", "--batch_size", "8", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_a_compiled_bench_has_one_graph_for_all_loops(monkeypatch):
    """Bare, engine's and both passes of looks; by aot_eager, whose graphs are inductor's."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(loops, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    costs = compare(Problem(k=2, compiled="blocks", **SMALL), ["adamw", "look_sam"], repeats=1)
    assert counters["stats"]["unique_graphs"] == 1
    assert [c.passes_per_step for c in costs] == [1.0, 1.5]


def test_a_small_size_is_timed_with_the_images_that_it_is_for():
    """vit_28_mini had 1,024 tokens of 224 pixels in three colours."""
    for name in ("vit_28", "vit_28_p4", "vit_28_mini"):
        assert Problem(k=2, **SMALL | {"model": name}).shape == (1, 28, 28)
    assert Problem(k=2, **SMALL | {"model": "vit_8"}).shape == (1, 8, 8)
    assert Problem(k=2, **SMALL | {"model": "vit_ti16"}).shape == (3, 224, 224)
