"""examples/accelerate_loop.py as it is written, in one process, against Engine."""

import argparse
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dist_looksam import ConfigError, Engine

pytestmark = [pytest.mark.slow, pytest.mark.needs("accelerate")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"


@pytest.fixture
def example():
    """Accelerate's state is of the process, and gone after the test."""
    import accelerate.state

    yield argparse.Namespace(**runpy.run_path(str(EXAMPLE)))
    for kind in ("AcceleratorState", "GradientState", "PartialState"):
        getattr(accelerate.state, kind)._reset_state()


def same(got, want) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_loop_trains_to_engines_weights_and_its_state_resumes_between_two_looks(
    precision, example, tmp_path
):
    accelerator = example.Accelerator(mixed_precision=precision, cpu=True)
    model = accelerator.unwrap_model(example.train(accelerator, epochs=1))
    accelerator.save_state(str(tmp_path))

    own, optimizer = example.parts()
    plain = {"no": "fp32"}.get(precision, precision)
    loss = lambda model, batch: F.cross_entropy(model(batch[0]).float(), batch[1])  # noqa: E731
    engine = Engine(own, optimizer, loss, clip=1.0, precision=plain)
    images, labels = example.samples().tensors
    batches = list(zip(images.split(example.BATCH), labels.split(example.BATCH), strict=True))
    looks = [engine.step([batch]).look for batch in batches]
    assert looks == [step % 3 == 0 for step in range(10)] and same(model, own)

    for step in range(10, 13):  # a look at 12
        engine.step([batches[step - 10]])
    loaded, again = accelerator.unwrap_model(model), accelerator._optimizers[-1]
    with torch.no_grad():
        for p in loaded.parameters():
            p.zero_()
    again.optimizer.load_state_dict(example.parts()[1].state_dict())
    accelerator.load_state(str(tmp_path))
    for images, labels in batches[:3]:

        def closure(images=images, labels=labels):
            again.zero_grad()
            with accelerator.autocast():
                value = F.cross_entropy(loaded(images), labels)
            accelerator.backward(value)
            return value

        again.step(closure)
    assert again.optimizer.steps == 13 and same(loaded, own)


def test_accumulation_by_accelerate_is_refused(example):
    accelerator = example.Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps 2; use 1, or give all"):
        example.train(accelerator, epochs=1)
