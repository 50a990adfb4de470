"""torch.distributed.checkpoint saves our optimizers as it saves torch's own."""

import pytest
import small
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dist_looksam.errors import ConfigError


def trained(name, base, steps):
    engine = small.engine(small.net(), name, base, k=5)
    for t in range(steps):
        engine.step(small.micro_batches(t))
    return engine


def assert_go_on_alike(whole, other, begin=7):
    for t in range(begin, begin + 6):
        assert whole.step(small.micro_batches(t)).look == other.step(small.micro_batches(t)).look
    for p, q in zip(whole.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("base", ["sgd", "adamw", "lamb", "lars"])
@pytest.mark.parametrize("name", ["look_sam", "sam_k"])
def test_a_run_saved_by_it_goes_on_bit_for_bit(name, base, tmp_path):
    """ "needs a closure" was raised, and the counters were not among what it saved."""
    whole, other = trained(name, base, 7), trained(name, base, 0)
    saved = get_optimizer_state_dict(whole.module, whole.optimizer)
    weights = whole.module.state_dict()
    dcp.save({"model": weights, "optimizer": saved}, checkpoint_id=tmp_path)
    before = [p.detach().clone() for p in other.module.parameters()]
    into = {
        "model": other.module.state_dict(),
        "optimizer": get_optimizer_state_dict(other.module, other.optimizer),
    }
    assert all(map(torch.equal, before, other.module.parameters()))
    assert other.optimizer.steps == 0 and other.optimizer.param_groups[0]["lr"] > 0
    dcp.load(into, checkpoint_id=tmp_path)
    other.module.load_state_dict(into["model"])
    set_optimizer_state_dict(other.module, other.optimizer, into["optimizer"])
    assert other.optimizer.steps == 7
    assert_go_on_alike(whole, other)


def test_flattened_without_the_counters_it_is_refused_in_a_sentence():
    whole, other = trained("look_sam", "adamw", 7), trained("look_sam", "adamw", 0)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(whole.module, whole.optimizer, options=options)
    with pytest.raises(ConfigError, match="g_v without them"):
        set_optimizer_state_dict(other.module, other.optimizer, saved, options=options)


def test_step_without_a_closure_is_still_refused():
    engine = trained("look_sam", "adamw", 0)
    with pytest.raises(ConfigError, match="needs a closure"):
        engine.optimizer.step()
    small.loss(engine.module, small.batch(0)).backward()
    with pytest.raises(ConfigError, match="needs a closure"):
        engine.optimizer.step()
