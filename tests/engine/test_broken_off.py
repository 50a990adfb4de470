"""A step that an exception breaks off, on one rank: by Engine, and by a closure."""

import copy

import pytest
import small
import torch
from torch import nn

from dist_looksam import LookSAM

WHERE = [(1, "before"), (1, "after"), (2, "before"), (2, "after")]


class Breaking:
    """small.loss with noise; one call of a pass raises, before or after it is computed."""

    def __init__(self) -> None:
        self.left, self.place = 0, ""

    def arm(self, calls: int, place: str) -> None:
        self.left, self.place = calls, place

    def __call__(self, model, pair):
        self.left -= 1
        if self.left == 0 and self.place == "before":
            raise MemoryError
        value = small.loss(model, pair) * (1 + 0.1 * torch.rand(()))
        if self.left == 0:
            raise MemoryError
        return value


def everything(model, optimizer) -> list[torch.Tensor]:
    saved = optimizer.state_dict()
    states = [v for s in saved["state"].values() for v in s.values() if torch.is_tensor(v)]
    counts = torch.tensor(list(saved["sharpness"].values()))
    tensors = [*model.state_dict().values(), *states, counts, torch.get_rng_state()]
    return [copy.deepcopy(t.detach()) for t in tensors]


def same(xs, ys) -> bool:
    return len(xs) == len(ys) and all(map(torch.equal, xs, ys))


def net():
    return small.net(nn.BatchNorm1d(small.HIDDEN), nn.Dropout(0.3))


@pytest.mark.parametrize("next_step", [3, 4], ids=["again", "plain step next"])
@pytest.mark.parametrize("number, place", WHERE)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_by_engine_the_step_has_never_begun(precision, number, place, next_step):
    """After a look that ran out of memory in its second pass, the next plain step was taken for
    that look's end: it restored the weights of then and gave the base the old g."""
    ends = []
    for breaks in (False, True):
        model, loss = net(), Breaking()
        engine = small.engine(model, "look_sam", loss=loss, precision=precision)
        torch.manual_seed(7)
        for t in range(3):
            engine.step(small.micro_batches(t, accumulation=2))
        if breaks:
            before, passes = everything(model, engine.optimizer), engine.passes
            loss.arm(2 * (number - 1) + 2, place)
            with pytest.raises(MemoryError):
                engine.step(small.micro_batches(50, accumulation=2))
            assert same(before, everything(model, engine.optimizer))
            assert engine.passes == passes
        engine.optimizer.steps = next_step
        for t in range(3, 6):
            engine.step(small.micro_batches(t, accumulation=2))
        ends.append(everything(model, engine.optimizer))
    assert same(*ends)


@pytest.mark.parametrize("next_step", [2, 3], ids=["again", "plain step next"])
@pytest.mark.parametrize("number, place", WHERE)
def test_by_closure_the_step_has_never_begun(number, place, next_step):
    ends = []
    for breaks in (False, True):
        model, loss = net().double(), Breaking()
        params = list(model.parameters())
        base = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        optimizer = LookSAM(params, base, rho=0.05, k=2, model=model)
        torch.manual_seed(7)

        def step(t, optimizer=optimizer, model=model, loss=loss):
            def closure():
                optimizer.zero_grad()
                value = loss(model, small.batch(t))
                value.backward()
                return value

            optimizer.step(closure)

        step(0)
        step(1)
        if breaks:
            before = everything(model, optimizer)
            loss.arm(number, place)
            with pytest.raises(MemoryError):
                step(50)
            assert same(before, everything(model, optimizer))
        optimizer.steps = next_step
        for t in range(2, 5):
            step(t)
        ends.append(everything(model, optimizer))
    assert same(*ends)


def test_micro_batches_that_cannot_be_read_again_break_the_step_off():
    """A list that reads from files may fail in the second pass, too."""

    class Files(list):
        reads = 0

        def __iter__(self):
            Files.reads += 1
            if Files.reads == 2:
                raise OSError("stale file handle")
            return super().__iter__()

    model = net()
    engine = small.engine(model, "look_sam")
    before = everything(model, engine.optimizer)
    with pytest.raises(OSError, match="stale"):
        engine.step(Files(small.micro_batches(0)))
    assert same(before, everything(model, engine.optimizer))
    assert engine.step(Files(small.micro_batches(0))).look
