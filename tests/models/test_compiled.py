"""--compile blocks in one process; tests/ranks/test_compiled_ranks.py has the backends."""

import copy
import json

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from dist_looksam import ConfigError, Engine, LookSAM, models
from dist_looksam.backends import compiled
from dist_looksam.cli.main import main
from dist_looksam.optim import table
from dist_looksam.run import dryrun
from dist_looksam.settings.config import parse

IMAGE = (1, 8, 8)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def vit(**how):
    torch.manual_seed(0)
    return models.create("vit_8", num_classes=10, image_shape=IMAGE, **how).train()


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0], batch[2]), batch[1])


def micro_batches(t, size=8):
    draw = torch.Generator().manual_seed(t)
    return [
        (torch.randn(size, *IMAGE, generator=draw), torch.randint(10, (size,), generator=draw),
         torch.arange(size) + 100 * t + size * i)
        for i in range(2)
    ]  # fmt: skip


def trained(model, steps=7, **how):
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine = Engine(model, LookSAM(model.parameters(), base, rho=0.05, k=3), loss, **how)
    for t in range(steps):
        engine.step(micro_batches(t))
    return engine


def test_both_passes_all_micro_batches_and_all_blocks_share_one_graph():
    eager, model = vit(drop_path=0.3), vit(drop_path=0.3)
    names = list(model.state_dict())
    assert len(compiled.compile_blocks(model, backend="aot_eager")) == 4
    trained(eager)
    trained(model)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["recompiles"]
    assert list(model.state_dict()) == names
    for a, b in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    with torch.no_grad():
        a, b = (m.eval()(micro_batches(9)[0][0]) for m in (eager, model))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_every_optimizer_trains_compiled_blocks_by_one_graph_to_the_eager_weights():
    """One graph for all of them: nothing of an optimizer is in it."""
    eager, model = vit(drop_path=0.3), vit(drop_path=0.3)
    compiled.compile_blocks(model, backend="aot_eager")
    start = copy.deepcopy(model.state_dict())
    for name, row in table.METHODS.items():
        for net in (eager, model):
            net.load_state_dict(start)
            net.zero_grad(set_to_none=True)
            base = table.build_base(row.base, table.groups(net, 0.1), lr=0.01, eps=1e-4)
            rule = table.rule_of(name, k=2 if row.settable_k else 1)
            engine = Engine(net, table.build(base, rule=rule, rho=0.05, alpha=0.5), loss)
            for t in range(3):
                engine.step(micro_batches(t))
        for a, b in zip(eager.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["recompiles"]


def test_parts_of_micro_batches_need_one_more_graph_only():
    model = vit()
    compiled.compile_blocks(model, backend="aot_eager")
    trained(model, m=4)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_copy_uses_its_own_weights():
    """A compiled function that was bound to the original would train these."""
    model = vit()
    compiled.compile_blocks(model, backend="aot_eager")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    batch = micro_batches(0)[0]
    loss(twin, batch).backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in model.parameters())


class Printing(nn.Linear):
    def forward(self, x):
        print("a side effect")
        return super().forward(x).relu()


def test_a_block_that_is_not_one_graph_is_refused_in_the_first_step():
    model = nn.Sequential(Printing(4, 4), Printing(4, 4))
    compiled.compile_blocks(model, backend="aot_eager")
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = LookSAM(model.parameters(), base, rho=0.05)
    engine = Engine(model, optimizer, lambda m, x: m(x).square().mean())
    with pytest.raises(ConfigError, match="needs a block that is one graph, got Printing, for"):
        engine.step([torch.ones(2, 4)])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Named(nn.Linear):
    """Its forward depends on a word of the block's own: every block needs another graph."""

    def __init__(self, n):
        super().__init__(4, 4)
        self.word = "x" * n

    def forward(self, x):
        return super().forward(x) * len(self.word)


def test_more_graphs_than_torch_allows_are_refused_and_not_run_eagerly():
    """Beyond its limit torch.compile runs eagerly, with a line in a log. Importing timm lifts that
    limit to a million: 39 graphs were compiled."""
    model = nn.Sequential(*(Named(n) for n in range(1, 40)))
    with torch._dynamo.config.patch(cache_size_limit=10**6):
        compiled.compile_blocks(model, backend="aot_eager")
        with pytest.raises(ConfigError, match="needs a block that is one graph, got Named"):
            model(torch.ones(2, 4))


@pytest.mark.parametrize("net", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh())])
def test_a_network_without_blocks_is_refused(net):
    with pytest.raises(ConfigError, match="needs a network with a list of blocks of one class"):
        compiled.compile_blocks(net)


def test_a_machine_without_a_compiler_is_told_before_training(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = ["--data", "digits", "--compile", "blocks", "--device", "cpu"]
    assert main(["train", *flags, "--out", str(tmp_path / "run")]) == 2
    assert "compile blocks needs a C++ compiler, got none of g++" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_checks_the_blocks():
    settings = parse(["--data", "digits", "--compile", "blocks", "--steps", "5"])
    assert dryrun.check(settings, ranks=1).settings.compile == "blocks"


@pytest.mark.slow
def test_a_compiled_run_goes_on_to_the_same_bits_and_names_a_change(tmp_path, monkeypatch):
    """With inductor, as users run it: resumed in mid-cycle; resumed without --compile, a note."""
    from safetensors.torch import load_file

    flags = [
        "--data",
        "digits",
        "--steps",
        "8",
        "--batch_size",
        "32",
        "--k",
        "3",
        "--device",
        "cpu",
    ]
    flags += ["--optimizer", "look_sam", "--save_every", "4", "--compile", "blocks"]
    assert main(["train", *flags, "--out", str(tmp_path / "whole")]) == 0
    from_4 = ["--resume", str(tmp_path / "whole/checkpoints/step-4")]
    assert main(["train", *flags, *from_4, "--out", str(tmp_path / "again")]) == 0
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "again"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    eager = [f for f in flags if f not in ("--compile", "blocks")]
    assert main(["train", *eager, *from_4, "--out", str(tmp_path / "eager")]) == 0
    assert "compile is off, was blocks when" in (tmp_path / "eager/log.txt").read_text()
    first = json.loads((tmp_path / "again/metrics.jsonl").read_text().splitlines()[0])
    assert first["images_per_s"] is None
