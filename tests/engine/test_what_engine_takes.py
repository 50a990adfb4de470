"""Engine trains modules, optimizers and micro-batches rightly, or refuses them in a sentence."""

import warnings
from dataclasses import dataclass

import pytest
import small
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_looksam import SAM, ConfigError, Engine, LookSAM

SGD = torch.optim.SGD


def sgd(params):
    return SGD(params, lr=0.1, momentum=0.9)


def engine(model, params=None, loss=small.loss, **how):
    params = list(model.parameters() if params is None else params)
    return Engine(model, SAM(params, sgd(params)), loss, **how)


@pytest.fixture
def group(tmp_path):
    """A process group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- parameters ----------------------------------------------------------------------------------


def test_parameters_outside_the_module_are_refused():
    """A head or a temperature of the loss: in fp16 never unscaled (it moved 2338 instead of .036),
    under DDP never averaged, and in no checkpoint."""
    model, head = small.net(), nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"must be the module's, got one of shape \(4, 4\)"):
        engine(model, [*model.parameters(), *head.parameters()])
    both = nn.ModuleList([model, head])
    assert engine(both, loss=lambda m, b: m[0](b[0]).sum()).module is both


def test_a_group_added_later_must_be_the_modules():
    model = small.net()
    own = engine(model, list(model.parameters())[:2])
    with pytest.raises(ConfigError, match="must be the module's"):
        own.optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    own.optimizer.add_param_group({"params": list(model.parameters())[2:]})
    assert bool(own.step(small.micro_batches(0)).seen.finite)


def test_a_group_added_to_the_base_itself_must_be_the_modules():
    model = small.net()
    own = engine(model, list(model.parameters())[:2])
    own.step(small.micro_batches(0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    own.optimizer.base_optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    with pytest.raises(ConfigError, match="must be the module's"):
        own.step(small.micro_batches(1))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_frozen_and_tied_and_left_out_parameters_are_the_users_choice():
    model = small.net(nn.Linear(small.HIDDEN, small.HIDDEN), nn.Linear(small.HIDDEN, small.HIDDEN))
    model[1].weight = model[2].weight
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    some = [p for p in model.parameters() if p is not model[4].bias]
    before = [p.detach().clone() for p in (*model[0].parameters(), model[4].bias)]
    own = engine(model, some)
    for t in range(3):
        done = own.step(small.micro_batches(t))
    after = [*model[0].parameters(), model[4].bias]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    grads = [p.grad for p in some if p.grad is not None]
    assert float(done.seen.update_norm) == pytest.approx(
        float(torch.stack([g.norm() for g in grads]).norm())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_are_refused_and_frozen_ones_are_not(dtype):
    """At rho .02 a quarter of the entries moved at all, and nothing was told."""
    with pytest.raises(ConfigError, match="trained weights must be fp32, got one of shape"):
        engine(small.net(dtype=dtype))
    model = small.net(dtype=dtype)
    model.requires_grad_(False)
    model[2] = nn.Linear(small.HIDDEN, small.CLASSES)
    engine(model)


def test_a_complex_parameter_is_refused():
    model = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(ConfigError, match="parameters must be real"):
        Engine(model, sgd(model.parameters()), small.loss)


@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_is_refused(group, original):
    """Its norms were each rank's own: .287 on one and .494 on the other."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    module = small.net(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(
            module, use_orig_params=original, device_id=torch.device("cpu")
        )
    with pytest.raises(ConfigError, match=r"got those of FullyShardedDataParallel \(FSDP1\)"):
        engine(model)
    with pytest.raises(ConfigError, match=r"got those of FullyShardedDataParallel \(FSDP1\)"):
        LookSAM(model.parameters(), sgd(model.parameters())).step(lambda: torch.zeros(()))


# --- wrappers ------------------------------------------------------------------------------------


def test_a_compiled_module_trains_as_it_does_without(group):
    """torch.compile(DDP(m)) was put in a second DDP, and its result was random."""
    trained = []
    for wrap in (
        lambda m: m,
        lambda m: torch.compile(m, backend="eager"),
        DistributedDataParallel,
        lambda m: torch.compile(DistributedDataParallel(m), backend="eager"),
        lambda m: DistributedDataParallel(torch.compile(m, backend="eager")),
    ):
        model = small.net()
        own = engine(wrap(model))
        for t in range(3):
            own.step(small.micro_batches(t, accumulation=2))
        assert sum(isinstance(m, DistributedDataParallel) for m in own.backend.model.modules()) < 2
        assert not isinstance(own.module, DistributedDataParallel)
        trained.append(small.weights(model))
    for other in trained[1:]:
        for got, want in zip(other, trained[0], strict=True):
            assert abs(got - want).max() < 1e-12


@pytest.mark.parametrize("reach", [lambda model, net: net, lambda model, net: model.module])
def test_under_ddp_a_loss_that_does_not_call_its_model_is_refused(group, reach):
    """Every rank trained alone, and the mean loss in the log looked right."""
    net = small.net()
    before = small.weights(net)
    own = engine(DistributedDataParallel(net), loss=lambda m, pair: small.loss(reach(m, net), pair))
    with pytest.raises(ConfigError, match="must call the model that it is given"):
        own.step(small.micro_batches(0))
    assert all((a == b).all() for a, b in zip(before, small.weights(net), strict=True))


def test_under_ddp_a_loss_may_call_forward_itself(group):
    own = engine(
        DistributedDataParallel(small.net()), loss=lambda m, pair: small.loss(m.forward, pair)
    )
    assert bool(own.step(small.micro_batches(0)).seen.finite)


def test_several_ranks_without_a_process_group_are_refused(monkeypatch, group):
    """Under torchrun each would train alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    engine(small.net())
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="group of the 2 ranks that WORLD_SIZE names, got none"):
        engine(small.net())


def test_a_part_in_ddp_is_refused(group):
    model = small.net()
    model[0] = DistributedDataParallel(model[0])
    with pytest.raises(ConfigError, match="must be around the whole module, got it around a part"):
        engine(model)


def test_a_plain_base_that_calls_a_closure_is_refused():
    model = small.net()
    with pytest.raises(ConfigError, match="must step from gradients alone, got LBFGS"):
        Engine(model, torch.optim.LBFGS(model.parameters()), small.loss)


# --- micro-batches -------------------------------------------------------------------------------

x, y = torch.randn(12, small.INPUTS, dtype=torch.float64), torch.randint(4, (12,))


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


SHORT = {
    "pairs": [(x[:10], y[:10]), (x[10:], y[10:])],
    "dictionaries": [{"x": x[:10], "y": y[:10]}, {"x": x[10:], "y": y[10:]}],
    "nested": [[(x[:10],), {"y": y[:10]}], [(x[10:],), {"y": y[10:]}]],
    "dataclasses": [Pair(x[:10], y[:10]), Pair(x[10:], y[10:])],
    "tensors": [x[:10], x[10:]],
}


@pytest.mark.parametrize("kind", SHORT)
def test_micro_batches_of_unequal_size_are_refused(kind):
    """The last two samples of 12 counted as much as the ten before: the step was off by 130 %."""
    own = engine(small.net())
    with pytest.raises(ConfigError, match=r"equally many samples.*got 10 and 2"):
        own.step(SHORT[kind])


def test_a_micro_batch_without_samples_is_refused():
    """Its mean loss is nan, with a gradient of zero: the step was taken as a good one."""
    own = engine(small.net())
    x, y = small.micro_batches(0)[0]
    with pytest.raises(ConfigError, match="at least one sample, got one of none"):
        own.step([(x[:0], y[:0])])


def test_what_has_no_size_is_taken_as_it_is():
    """Tensors of a batch that differ in their first dimension, and objects of the caller's."""
    own = engine(small.net(), loss=lambda m, b: small.loss(m, b[0]))
    for length in (3, 5):
        pair = (x[:length], y[:length])
        own.step([(pair, torch.zeros(7)), ((x, y), torch.zeros(7))])
    own = engine(small.net(), loss=lambda m, b: small.loss(m, (x[: b.n], y[: b.n])))
    own.step([type("Own", (), {"n": n})() for n in (3, 5)])


@pytest.mark.parametrize(("batches", "says"), [
    ([], "at least one micro-batch, got an empty list"),
    ((pair for pair in [(x, y)]), "a list of micro-batches.*got generator"),
    (x, "a list of micro-batches.*got Tensor"),
    ({"x": x, "y": y}, "a list of micro-batches.*got dict"),
], ids=["empty", "generator", "tensor", "dict"])  # fmt: skip
def test_what_is_no_list_of_micro_batches_is_refused(batches, says):
    """A TypeError, or NaN as the mean over none of them."""
    model = small.net()
    own = engine(model)
    before = small.weights(model)
    with pytest.raises(ConfigError, match=says):
        own.step(batches)
    assert all((a == b).all() for a, b in zip(small.weights(model), before, strict=True))
    assert own.optimizer.steps == 0


# --- schedulers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["optimizer", "base", "before", "plain"])
@pytest.mark.parametrize("name", ["sgd", "sam", "look_sam"])
def test_a_scheduler_after_engine_step_is_not_warned_about(name, on):
    """torch said that lr_scheduler.step() had come before optimizer.step()."""
    model = small.net()
    optimizer = small.optimizer(model, name)
    make = torch.optim.lr_scheduler.ExponentialLR
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if on == "before":
            scheduler = make(optimizer, 0.5)
        own = Engine(model, sgd(model.parameters()) if on == "plain" else optimizer, small.loss)
        if on != "before":
            base = own.optimizer.base_optimizer
            scheduler = make(own.optimizer if on == "optimizer" else base, 0.5)
        for t in range(2):
            own.step(small.micro_batches(t))
            scheduler.step()
    group = own.optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(group["initial_lr"] / 4)


def test_a_scheduler_before_the_first_step_is_still_warned_about():
    model = small.net()
    own = engine(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(own.optimizer, 0.5)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_weights_on_several_devices_are_refused():
    """torch's own error came in the middle of the first step. meta stands for a second GPU."""
    model = small.net()
    model[0].to("meta")
    with pytest.raises(ConfigError, match="must be on one device, got cpu and meta"):
        engine(model)
