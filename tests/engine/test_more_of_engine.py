"""More that Engine is given: arguments of another kind, losses, parts of a batch, later changes."""

import pytest
import small
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, mse_loss

from dist_looksam import SAM, ConfigError, Engine, LookSAM

SGD = torch.optim.SGD


def engine(loss=small.loss, model=None, **how):
    model = model or small.net()
    return Engine(model, LookSAM(model.parameters(), SGD(model.parameters(), lr=0.1)), loss, **how)


BAD_LOSSES = {
    "of each sample": lambda m, b: cross_entropy(m(b[0]), b[1], reduction="none"),
    "of shape (1,)": lambda m, b: small.loss(m, b)[None],
    "a number": lambda m, b: small.loss(m, b).item(),
    "with outputs": lambda m, b: (small.loss(m, b), m(b[0])),
    "a dictionary": lambda m, b: {"loss": small.loss(m, b)},
    "nothing": lambda m, b: None,
    "detached": lambda m, b: small.loss(m, b).detach(),
    "whole numbers": lambda m, b: m(b[0]).argmax(-1).sum(),
}


@pytest.mark.parametrize("loss", BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_a_loss_that_is_no_number_with_a_gradient_is_a_sentence(loss):
    """Each was a TypeError, AttributeError or RuntimeError from inside the backend."""
    own = engine(loss)
    with pytest.raises(ConfigError, match="loss must return the mean loss"):
        own.step(small.micro_batches(0))
    assert own.optimizer.steps == 0


def test_a_step_may_be_taken_under_no_grad():
    """As that of the closure form; it was torch's RuntimeError."""
    one, two = engine(), engine()
    for t in range(3):
        one.step(small.micro_batches(t))
        with torch.no_grad():
            two.step(small.micro_batches(t))
    for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_arguments_of_another_kind_are_sentences():
    model = small.net()
    base = SGD(model.parameters(), lr=0.1)
    for arguments, says in [
        ((base, model, small.loss), "model must be a module"),
        ((list(model.parameters()), base, small.loss), "model must be a module"),
        ((model, SGD, small.loss), "must be an instance, got the class SGD"),
        ((model, "sam", small.loss), "got a str"),
        ((model, base, "mse"), "Engine needs loss, got a str"),
    ]:
        with pytest.raises(ConfigError, match=says):
            Engine(*arguments)
    with pytest.raises(ConfigError, match="clip must be a number"):
        engine(clip="1")


def test_one_batch_in_place_of_a_list_is_refused():
    """engine.step(batch) with [samples, labels], as a DataLoader gives: each was taken for a
    micro-batch. With a loss that indexes its batch, sample 0 became the input and sample 1 the
    target, which for images of one size trains without a word."""
    x, y = small.batch(0)
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return mse_loss(model(batch[0]), batch[1][: small.CLASSES])

    for batch in ([x, y], (x, y)):
        with pytest.raises(ConfigError, match=r"parts of one batch are; pass \[batch\]"):
            engine(loss).step(batch)
    assert not seen
    engine(lambda m, b: m(b).square().mean()).step([x, x])  # micro-batches that are tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_turned_into_16_bits_later_are_refused(dtype):
    """At construction they were refused; after `module.half()` a step rounded most of eps away."""
    own = engine(lambda m, b: m(b[0].to(dtype)).float().square().mean())
    own.module.to(dtype)
    with pytest.raises(ConfigError, match="trained weights must be fp32"):
        own.step(small.micro_batches(0))


class Sometimes(nn.Module):
    """With a part that `used` switches on."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.part, self.used = small.net(), nn.Linear(6, 4).double(), True
        self.factor = 1.0

    def forward(self, x):
        return self.base(x) + (self.factor * self.part(x) if self.used else 0.0)


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "fsdp2"])
def test_a_layer_that_the_first_pass_alone_uses_counts_by_engine_too(shard, tmp_path):
    """See tests/optim/test_more_mistakes.py. Where the second pass gives it a gradient of zero, by
    way of `0 * part`, the result is the same. FSDP2's shards do not require gradients."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for a, b in zip(_sometimes(shard, zero=False), _sometimes(shard, zero=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    finally:
        dist.destroy_process_group()


def _sometimes(shard, *, zero):
    """Weights and norms after three steps, of which the second pass did not use the part."""
    torch.manual_seed(0)
    model, calls = Sometimes(), []
    if shard:
        fully_shard(model)
    optimizer = LookSAM(model.parameters(), SGD(model.parameters(), lr=0.1), k=2)

    def loss(m, batch):
        calls.append(1)
        m.used = zero or len(calls) != 2
        m.factor = 0.0 if len(calls) == 2 else 1.0
        return small.loss(m, batch)

    own = Engine(model, optimizer, loss)
    reports = [own.step(small.micro_batches(t)) for t in range(3)]
    return [*own.backend.full_weights().values(), *(r.seen.update_norm for r in reports)]


def test_sam_still_takes_a_plain_loss_of_any_floating_dtype():
    model = small.net()
    own = Engine(model, SAM(model.parameters(), SGD(model.parameters(), lr=0.1)),
                 lambda m, b: small.loss(m, b).half())  # fmt: skip
    assert bool(own.step(small.micro_batches(0)).loss.isfinite())
