"""Hugging Face Accelerate: one closure a step is the plain step; accumulation is refused."""

import pytest
import torch

from dist_looksam import LookSAM
from dist_looksam.errors import ConfigError

pytestmark = pytest.mark.needs("accelerate")


@pytest.fixture
def accelerate():
    """Accelerate, whose state is of the process, and gone after the test."""
    import accelerate.state

    yield accelerate
    for kind in ("AcceleratorState", "GradientState", "PartialState"):
        getattr(accelerate.state, kind)._reset_state()


def parts():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 2)
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return net, LookSAM(net.parameters(), base, rho=0.1, k=2)


def closure_of(net, optimizer, step, backward):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

    def closure():
        optimizer.zero_grad()
        loss = net(x).square().mean()
        backward(loss)
        return loss

    return closure


def test_an_accelerated_loop_gives_the_weights_of_a_plain_one(accelerate):
    accelerator = accelerate.Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(*parts())
    plain, own = parts()
    for step in range(5):
        optimizer.step(closure_of(net, optimizer, step, accelerator.backward))
        own.step(closure_of(plain, own, step, torch.Tensor.backward))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


def test_accumulation_which_would_lose_micro_batches_is_refused(accelerate):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    net, optimizer = accelerator.prepare(*parts())
    with pytest.raises(ConfigError, match=r"must not accumulate .* gradient_accumulation_steps 4"):
        for step in range(4):
            with accelerator.accumulate(net):
                optimizer.step(closure_of(net, optimizer, step, accelerator.backward))
