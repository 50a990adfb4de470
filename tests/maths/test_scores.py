"""Scores of classification where some samples have no label."""

import torch

from dist_looksam.maths import scores


def test_samples_without_a_label_count_in_no_score():
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 7), torch.randint(7, (40,))
    labels[::4] = -1
    seen = labels != -1
    for of in (scores.sums, scores.bins):
        want = of(logits[seen], labels[seen], ignore=-1)
        assert torch.allclose(of(logits, labels, ignore=-1), want)
    assert scores.sums(logits, labels, ignore=-1)[3] == 30


def test_top5_is_the_share_among_the_five_largest_and_of_fewer_classes_all():
    logits = torch.arange(8.0).flip(0).repeat(8, 1)  # class 0 is the largest
    assert scores.sums(logits, torch.arange(8), ignore=-1)[:2].tolist() == [1, 5]
    few = scores.sums(logits[:, :3], torch.tensor([0, 1, 2, 2, 1, 0, 0, 0]), ignore=-1)
    assert few[:2].tolist() == [4, 8]
