import torch

from dist_looksam.data.order import Order


def test_every_epoch_holds_every_sample_once():
    order = Order(97, seed=3)
    indices, epochs = order.at(torch.arange(97 * 4))
    for epoch in range(4):
        assert indices[epochs == epoch].sort().values.equal(torch.arange(97))


def test_epochs_and_seeds_are_shuffled_differently():
    first, second = (Order(97, seed=3).permutation(epoch) for epoch in (0, 1))
    assert not first.equal(second)
    assert not first.equal(torch.arange(97))
    assert not first.equal(Order(97, seed=4).permutation(0))


def test_one_read_may_span_many_epochs_in_any_order():
    positions = torch.arange(10 * 33)
    expected, _ = Order(10, seed=0).at(positions)
    mixed = torch.randperm(330, generator=torch.Generator().manual_seed(0))
    indices, epochs = Order(10, seed=0).at(mixed)
    assert indices.equal(expected[mixed])
    assert epochs.equal(mixed // 10)


def test_the_stream_is_the_published_one():
    """Fixed numbers: a change here would reorder the samples of every run that is resumed."""
    indices, _ = Order(8, seed=0).at(torch.arange(16))
    assert indices.tolist() == [0, 2, 1, 5, 4, 3, 6, 7, 5, 3, 7, 2, 4, 1, 0, 6]
