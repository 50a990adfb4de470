"""Which samples climb together."""

import pytest

from dist_looksam.errors import ConfigError
from dist_looksam.maths.together import Groups, groups, possible


def of(m, micro_batch, accumulation, ranks):
    return groups(m, micro_batch=micro_batch, accumulation=accumulation, ranks=ranks)


@pytest.mark.parametrize(
    ("m", "micro_batch", "accumulation", "ranks", "expected"),
    [
        (None, 8, 2, 4, None),
        (64, 8, 2, 4, None),
        (8, 8, 2, 4, Groups(ranks=1, micro_batches=1, rounds=2)),
        (16, 8, 2, 4, Groups(ranks=2, micro_batches=1, rounds=2)),
        (32, 8, 2, 4, Groups(ranks=4, micro_batches=1, rounds=2)),
        (64, 8, 4, 4, Groups(ranks=4, micro_batches=2, rounds=2)),
        (2, 8, 2, 4, Groups(ranks=1, micro_batches=1, rounds=8, parts=4)),
        (13, 208, 1, 1, Groups(ranks=1, micro_batches=1, rounds=16, parts=16)),
    ],
)
def test_groups_of_consecutive_samples(m, micro_batch, accumulation, ranks, expected):
    assert of(m, micro_batch, accumulation, ranks) == expected


@pytest.mark.parametrize(
    ("m", "micro_batch", "accumulation", "ranks", "nearest"),
    [(3, 8, 2, 4, 4), (24, 8, 2, 4, 32), (96, 8, 4, 4, 128), (128, 8, 2, 4, 64), (48, 8, 2, 3, 48),
     (12, 8, 2, 4, 16)],
)  # fmt: skip
def test_an_m_that_cannot_be_names_the_nearest_that_can(
    m, micro_batch, accumulation, ranks, nearest
):
    if nearest == m:
        assert of(m, micro_batch, accumulation, ranks) is None
        return
    with pytest.raises(
        ConfigError, match=rf"got {m} with .*; use m={nearest}, which is the nearest"
    ):
        of(m, micro_batch, accumulation, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 6])
def test_groups_are_runs_of_consecutive_samples_that_make_up_the_batch(accumulation, ranks):
    """Sample s of the batch is in micro-batch s // micro_batch; that is number a * ranks + r."""
    micro_batch = 4
    for m in possible(micro_batch=micro_batch, accumulation=accumulation, ranks=ranks):
        found = of(m, micro_batch, accumulation, ranks)
        if found is None:
            assert m == micro_batch * accumulation * ranks
            continue
        seen: dict[tuple[int, int], list[int]] = {}
        for rank in range(ranks):
            own = [
                sample
                for a in range(accumulation)
                for sample in range((a * ranks + rank) * 4, (a * ranks + rank) * 4 + 4)
            ]
            size = len(own) // found.rounds
            for turn in range(found.rounds):
                block = rank // found.ranks
                seen.setdefault((block, turn), []).extend(own[turn * size : (turn + 1) * size])
        assert sorted(sorted(group) for group in seen.values()) == [
            list(range(start, start + m)) for start in range(0, 4 * accumulation * ranks, m)
        ]
