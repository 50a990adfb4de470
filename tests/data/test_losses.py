"""The training losses as torch computes them, and --class_weights."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dist_looksam.data import Batch, class_weights, losses
from dist_looksam.errors import ConfigError
from dist_looksam.settings import config

TRAIN = SimpleNamespace(class_names=("cat", "dog"), labels=torch.tensor([0, 0, 0, 1]))
LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def batch(**mixed) -> Batch:
    labels = torch.tensor([0, 2, 1, 1])
    images = torch.zeros(4, 1, 2, 2)
    return Batch(images=images, labels=labels, keys=torch.arange(4), mean=(), std=(), **mixed)


def mixed() -> Batch:
    lam = torch.tensor([0.25, 0.25, 0.6, 0.6])
    return batch(lam=lam, partner=torch.tensor([2, 0, 1, 1]))


def test_targets_are_probabilities_that_mixing_and_smoothing_share_out():
    assert losses.targets(batch(), 3).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0]]
    want = torch.tensor([[0.25, 0, 0.75], [0.75, 0, 0.25], [0, 1, 0], [0, 1, 0]])
    assert torch.allclose(losses.targets(mixed(), 3, 0.3), 0.7 * want + 0.1, atol=1e-7)


def test_binary_cross_entropy_is_the_mean_over_images_and_classes():
    want = F.binary_cross_entropy(LOGITS.sigmoid(), losses.targets(mixed(), 3, 0.3))
    assert torch.allclose(losses.binary_cross_entropy(LOGITS, mixed(), 0.3), want, atol=1e-6)
    both = torch.tensor([[1.0, 0, 1], [1, 0, 1], [0, 1, 0], [0, 1, 0]])
    got = losses.binary_cross_entropy(LOGITS, mixed(), threshold=0.0)
    assert torch.allclose(got, F.binary_cross_entropy(LOGITS.sigmoid(), both), atol=1e-6)
    got = losses.binary_cross_entropy(LOGITS, mixed(), threshold=0.5)
    one = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    assert torch.allclose(got, F.binary_cross_entropy(LOGITS.sigmoid(), one), atol=1e-6)


def test_half_precision_logits_lose_nothing_more():
    half = LOGITS.bfloat16()
    got, want = (losses.binary_cross_entropy(x, mixed()) for x in (half, half.float()))
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_a_weight_multiplies_a_classs_share_of_the_target_and_the_divisor_is_the_number_of_images():
    weights = torch.tensor([0.5, 2.0, 1.0])
    shares = losses.targets(mixed(), 3, 0.3)
    want = -(shares * weights * LOGITS.log_softmax(1)).sum() / 4
    assert torch.allclose(losses.cross_entropy(LOGITS, mixed(), 0.3, weights), want, atol=1e-6)
    want = F.cross_entropy(LOGITS, batch().labels, weights, reduction="sum") / 4
    assert torch.allclose(losses.cross_entropy(LOGITS, batch(), 0.0, weights), want, atol=1e-6)


def test_weights_are_one_on_average_of_the_training_images(tmp_path):
    balanced = class_weights.scaled("balanced", TRAIN)
    assert torch.allclose(balanced, torch.tensor([4 / 6, 2.0]))
    file = tmp_path / "weights.yaml"
    file.write_text("dog: 30\ncat: 10\n")  # the order is that of the labels, not of the file
    assert torch.allclose(class_weights.scaled(str(file), TRAIN), torch.tensor([2 / 3, 2.0]))


@pytest.mark.parametrize("text, said", [
    ("cat: 1", "got none of dog"), ("cat: 1\ndog: 1\ncow: 1", "got a weight of cow"),
    ("cat: -1\ndog: 1", "must be >= 0, got -1 of cat"), ("cat: .nan\ndog: 1", "got nan of cat"),
    ("cat: 0\ndog: 0", "must not be 0 for every"), ("- 1\n- 2", "by class name, got a list"),
    ("", "by class name, got nothing"), ("cat: [", "cannot be read"),
])  # fmt: skip
def test_a_wrong_file_of_weights_is_one_sentence(tmp_path, text, said):
    file = tmp_path / "weights.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        class_weights.scaled(str(file), TRAIN)
    assert "\n" not in str(error.value) and "use balanced, or a YAML file" in str(error.value)


def test_a_class_without_images_cannot_be_balanced():
    train = SimpleNamespace(class_names=("cat", "dog", "cow"), labels=TRAIN.labels)
    with pytest.raises(ConfigError, match="training images of every class, got none of cow"):
        class_weights.scaled("balanced", train)


@pytest.mark.parametrize("flags, said", [
    ("--loss mse", "loss must be one of ce, bce, got 'mse'"),
    ("--loss bce --class_weights balanced", "class_weights is of loss ce, got loss bce"),
    ("--bce_target_thresh 0.2", "bce_target_thresh is of loss bce, got loss ce"),
    ("--loss bce --bce_target_thresh 1", r"must be in \[0, 1\), got 1"),
    ("--loss bce --bce_target_thresh 0 --label_smoothing 0.1", "must not both be given"),
])  # fmt: skip
def test_settings_that_do_not_fit_the_loss_are_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        config.parse(flags.split())
