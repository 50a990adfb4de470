"""State of every shape and type, parameters in any memory layout, names of wrapped modules."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_restore import assert_same, batches, engine_of, held, normed, small_loss, steps
from torch import nn

from dist_looksam import Engine, LookSAM, restore
from dist_looksam.checkpoint import Reader, Writer, save
from dist_looksam.cli import main as cli
from dist_looksam.errors import ConfigError


class Odd(torch.optim.SGD):
    """Keeps state of many kinds, reads some of it, and changes its groups while it trains."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.update(d=torch.tensor(1.0), weight_sum=0.0, phase="warm", on_change=print)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["d"] = group["d"] * 1.1  # as Prodigy's
            group["weight_sum"] += group["lr"] ** 2  # as schedule-free's
            group["phase"] = "cold"
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(self.fresh(p))
                state["count"] += 1
                state["moments"][0].mul_(0.9).add_(p.grad)
                state["rows"] = p.grad.abs().reshape(p.shape[0], -1).mean(-1)
                state["half"] += p.grad.bfloat16()
                state["history"].append(float(p.grad.norm()))
                p -= group["lr"] * group["d"] * (state["moments"][0] + state["half"].float())
        return None

    def fresh(self, p):
        return {
            "count": 0, "moments": [torch.zeros_like(p)], "half": torch.zeros_like(p).bfloat16(),
            "code": torch.randint(255, p.shape).byte(), "mask": torch.ones_like(p).bool(),
            "table": torch.linspace(0, 1, 7, dtype=torch.float64), "nothing": None, "on": True,
            "exact": torch.tensor(0.1, dtype=torch.float64), "number": torch.tensor(2**53 + 1),
            "pair": (1, 2.5), "by number": {0: torch.ones(2)}, "history": [],
        }  # fmt: skip


def assert_same_value(mine, theirs):
    assert type(mine) is type(theirs)
    if isinstance(mine, list | tuple):
        for a, b in zip(mine, theirs, strict=True):
            assert_same_value(a, b)
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_same_value(mine[key], theirs[key])
    elif torch.is_tensor(mine):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    else:
        assert mine == theirs


def test_state_of_every_kind_comes_back_as_it_was(tmp_path):
    """Only tensors of the layer's shape and numbers were held, all numbers as float32."""
    first, second = engine_of(normed(), Odd), engine_of(normed(frozen=0.0), Odd)
    save(steps(first, 0, 5), tmp_path)
    restore(second, tmp_path)
    for p, q in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert_same_value(first.optimizer.state.get(p, {}), second.optimizer.state.get(q, {}))
    for mine, theirs in zip(first.optimizer.param_groups, second.optimizer.param_groups,
                            strict=True):  # fmt: skip
        for key in ("d", "weight_sum", "phase", "on_change"):
            assert_same_value(mine[key], theirs[key])
    steps(first, 5, 9), steps(second, 5, 9)
    for p, q in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(p, q)


BASES = {
    "Adafactor": {}, "NAdam": {}, "RAdam": {}, "ASGD": {}, "Rprop": {}, "Adadelta": {},
    "Adagrad": {}, "Adamax": {}, "RMSprop": {"momentum": 0.9, "centered": True},
}  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_any_base_of_torch_goes_on_bit_for_bit(base, tmp_path):
    """Adafactor's row_var and col_var were dropped, and the next step died."""
    kind = getattr(torch.optim, base)
    whole, first, second = (engine_of(normed(), kind, **BASES[base]) for _ in range(3))
    steps(whole, 0, 9)
    save(steps(first, 0, 5), tmp_path)
    restore(second, tmp_path)
    assert_same(held(first), held(second))
    assert_same(held(whole), held(steps(second, 5, 9)))


def test_a_scalar_parameters_state_is_held_once_and_exactly(tmp_path):
    """A 0-dim layer's moments have the shape of a number, and came back as float32 ones."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.line = nn.Linear(6, 3)
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return self.line(x) * self.scale

    def fresh():
        net = Scaled().double()
        base = torch.optim.NAdam(net.parameters(), lr=0.1)
        return Engine(net, LookSAM(net.parameters(), base, k=3), loss)

    def loss(model, pair):
        return small_loss(lambda x: model(x.double()), pair)

    whole, first, second = fresh(), fresh(), fresh()
    steps(whole, 0, 8)
    save(steps(first, 0, 5), tmp_path)
    restore(second, tmp_path)
    assert_same(held(first), held(second))
    assert_same(held(whole), held(steps(second, 5, 8)))


def test_state_that_no_file_can_hold_is_refused_at_the_first_save(tmp_path):
    class Foreign(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["plan"] = object()

    engine = steps(engine_of(normed(), Foreign), 0, 1)
    with pytest.raises(ConfigError, match=r"got a object as counters/layers/.*/plan"):
        save(engine, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_base_that_keeps_state_elsewhere_is_refused_by_the_writer(tmp_path):
    class Beside(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "slow_weights": [1]}

    with pytest.raises(ConfigError, match="got base Beside with slow_weights besides"):
        Writer(engine_of(normed(), Beside), tmp_path)


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4, 3)
        self.line = nn.Parameter(torch.randn(6, 3).t())  # not contiguous
        self.strided = nn.Parameter(torch.randn(8)[::2])
        self.register_buffer("shift", torch.randn(3, 2).t())

    def forward(self, x):
        hidden = torch.tanh(self.conv(x).mean((2, 3)) * self.strided)
        return self.head(hidden) + self.line.sum(1) + self.shift.sum()


def pictures(t):
    draw = torch.Generator().manual_seed(t)
    x = torch.randn(8, 2, 5, 5, generator=draw).to(memory_format=torch.channels_last)
    return [(x, torch.randint(0, 3, (8,), generator=draw))]


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.SGD])
def test_parameters_in_any_memory_layout_are_saved_and_loaded_exactly(base, tmp_path):
    """Writer.save raised "view size is not compatible" for channels_last convolutions."""

    def fresh():
        net = Convolved().to(memory_format=torch.channels_last)
        momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
        inner = base(net.parameters(), lr=0.1, **momentum)
        return Engine(net, LookSAM(net.parameters(), inner, k=3), small_loss)

    whole, first, second = fresh(), fresh(), fresh()
    assert not first.module.conv.weight.is_contiguous()
    for t in range(8):
        whole.step(pictures(t))
    for t in range(5):
        first.step(pictures(t))
    path = save(first, tmp_path)
    restore(second, tmp_path)
    assert_same(held(first), held(second))
    for t in range(5, 8):
        second.step(pictures(t))
    assert_same(held(whole), held(second))
    assert second.module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    kept = Reader(path)("conv.weight", "weight", 0, first.module.conv.weight.numel())
    assert torch.equal(kept, first.module.conv.weight.detach().reshape(-1))
    save_file(first.backend.full_weights(), tmp_path / "weights.safetensors")


def compiled(net):
    net[3] = torch.compile(net[3], backend="eager")
    return torch.compile(net, backend="eager")


def test_a_compiled_modules_names_keep_no_prefix(tmp_path):
    """Names began with _orig_mod., so that no other module could read the checkpoint."""
    plain, wrapped = engine_of(normed()), engine_of(compiled(normed()))
    names = list(normed().state_dict())
    path = save(steps(wrapped, 0, 4), tmp_path)
    assert list(wrapped.backend.full_weights()) == names
    assert {*Reader(path).tensor_shapes()} == {*names}
    restore(plain, path)
    other = engine_of(compiled(normed(frozen=0.0)))
    restore(other, path)
    for engine in (plain, other):
        assert_same(*({name.replace("_orig_mod.", ""): value for name, value in held(e).items()}
                      for e in (wrapped, engine)))  # fmt: skip


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_checkpoint_whose_names_have_a_prefix_still_loads(prefix, tmp_path, monkeypatch):
    first = steps(engine_of(normed()), 0, 4)
    for place in ("backends.plain", "checkpoint.module"):  # as older versions wrote names
        monkeypatch.setattr(f"dist_looksam.{place}.name_in", lambda module, name: prefix + name)
    save(first, tmp_path)
    monkeypatch.undo()
    second = engine_of(normed(frozen=0.0))
    restore(second, tmp_path)
    assert_same(held(first), held(second))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(6, 3, bias=False), nn.Linear(6, 3)
        self.out.weight = self.into.weight
        self.register_buffer("halves", torch.arange(6.0).view(3, 2)[:, 0])

    def forward(self, x):
        return self.out(x)


def test_tied_weights_have_both_names_and_can_be_written(tmp_path):
    """save_file raised at the end of a run, since the two names share memory."""
    net = Tied()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    engine = steps(Engine(net, LookSAM(net.parameters(), base), small_loss), 0, 2)
    weights = engine.backend.full_weights()
    assert list(weights) == list(net.state_dict())
    save_file(weights, tmp_path / "w.safetensors")
    path, exported = save(engine, tmp_path), tmp_path / "exported.safetensors"
    assert cli.main(["checkpoint", "export", str(path), str(exported)]) == 0
    for file in (tmp_path / "w.safetensors", exported):
        other = Tied()
        other.load_state_dict(load_file(file))
        assert torch.equal(other(batches(0)[0][0]), net(batches(0)[0][0]))


class Scaler(nn.Linear):
    """Keeps a number that is neither a parameter nor a buffer, as quantized layers do."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)

    def get_extra_state(self):
        return {"calls": self.calls, "last": torch.tensor([1.0, self.calls])}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_extra_state_of_modules_comes_back(tmp_path):
    """full_weights raised AttributeError, and a checkpoint did not hold it."""
    nets = [nn.Sequential(Scaler(6, 3)) for _ in range(2)]
    first, second = (Engine(net, torch.optim.SGD(net.parameters(), lr=0.1), small_loss)
                     for net in nets)  # fmt: skip
    save(steps(first, 0, 4), tmp_path)
    assert list(first.backend.full_weights()) == ["0.weight", "0.bias"]
    restore(second, tmp_path)
    assert nets[1][0].calls == 4
