"""examples/lightning_trainer.py as it is written, against Engine, and what it cannot do right."""

import argparse
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dist_looksam import ConfigError, Engine

pytestmark = [pytest.mark.slow, pytest.mark.needs("lightning")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_trainer.py"
STEPS, STOPPED = 14, 10
LOOKS = [0, 3, 6, 9, 12]


@pytest.fixture(scope="module")
def example():
    return argparse.Namespace(**runpy.run_path(str(EXAMPLE)))


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Where Lightning may leave files."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def batches(example, monkeypatch):
    """Step -> the batch that the Trainer gave it, the last time. No dropout: its numbers follow
    those that loaders and the Trainer draw."""
    seen = {}
    train = example.Classifier.training_step

    def noted(self, batch):
        seen[self.trainer.optimizers[0].steps] = list(batch)
        return train(self, batch)

    monkeypatch.setattr(example.Classifier, "training_step", noted)
    monkeypatch.setattr(torch.nn, "Dropout", lambda p: torch.nn.Identity())
    return seen


def of_engine(example, batches) -> dict[str, torch.Tensor]:
    example.L.seed_everything(0, verbose=False)
    model = example.Classifier()

    def loss(net, batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    engine = Engine(model.net, model.configure_optimizers(), loss, clip=1.0)
    looks = [engine.step([batches[step]]).look for step in range(STEPS)]
    assert [step for step, look in enumerate(looks) if look] == LOOKS
    return model.state_dict()


def same(got: dict, want: dict) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def test_the_trainer_trains_to_engines_weights_also_resumed_between_two_looks(
    example, in_folder, batches
):
    whole = example.fit(STEPS).state_dict()
    assert same(whole, of_engine(example, batches))
    example.fit(STOPPED).trainer.save_checkpoint("half.ckpt")
    resumed = example.fit(STEPS, resume="half.ckpt").state_dict()
    assert not same(resumed, whole)  # lightning 2.6 gives one batch twice, whatever the optimizer
    assert same(resumed, of_engine(example, batches))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gradient_clip_val": 0.5}, "must not clip.*gradient_clip_val=0.5; leave it out"),
        ({"accumulate_grad_batches": 2}, "must zero the gradients.*Engine do the step"),
    ],
)
def test_what_the_trainer_does_to_a_pass_is_refused(settings, sentence, example, in_folder):
    with pytest.raises(ConfigError, match=sentence):
        example.fit(4, **settings)


def test_a_loss_scale_is_refused(example, in_folder):
    """precision="16-mixed" by its plugin, since on a CPU Lightning takes bf16 instead."""
    from lightning.pytorch.plugins import MixedPrecision

    scaled = MixedPrecision("16-mixed", device="cpu")
    with pytest.raises(ConfigError, match="GradScaler, which unscales no pass"):
        example.fit(2, plugins=[scaled])


def test_clipping_by_the_modules_own_hook_is_refused(example, in_folder, monkeypatch):
    def configure_gradient_clipping(self, optimizer, **_):
        self.clip_gradients(optimizer, gradient_clip_val=0.1)

    name = "configure_gradient_clipping"
    monkeypatch.setattr(example.Classifier, name, configure_gradient_clipping, raising=False)
    with pytest.raises(ConfigError, match="got a configure_gradient_clipping of its own"):
        example.fit(2)
