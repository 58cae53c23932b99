"""The order law: a function of (seed, purpose, epoch, row), pinned by published numbers."""

import numpy as np
import pytest

from rae.store.errors import ConfigError
from rae.store.order import _splitmix64, batch_rows, draw, epoch_order, row_seed, steps_per_epoch


def test_the_primitive_is_splitmix64() -> None:
    """The first outputs of SplitMix64 from 1234567, as in Vigna's reference implementation (prng.di.unimi.it)."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert _splitmix64(1234567, np.arange(5)).tolist() == published


def test_the_law_never_changes() -> None:
    """Pinned: another result here means that no run can be resumed or repeated across this change."""
    assert epoch_order(10, seed=0, epoch=0).tolist() == [1, 0, 7, 8, 3, 5, 2, 4, 9, 6]
    assert row_seed(0, "noise", 3, 17) == 2921931964644485810
    assert draw(0, "view", 1, np.array([0, 5, 10**12])).tolist() == [
        0.3459711494794916,
        0.7873362627385352,
        0.5103492192757895,
    ]


def test_draws_are_the_row_seeds() -> None:
    rows = np.array([0, 1, 99, 2**40])
    expected = [(row_seed(7, "view", 2, int(row)) >> 11) * 2.0**-53 for row in rows]
    assert draw(7, "view", 2, rows).tolist() == expected
    assert draw(7, "view", 2, rows[::-1]).tolist() == expected[::-1]


def test_draws_are_uniform_and_their_purposes_independent() -> None:
    rows = np.arange(100_000)
    view, noise = draw(0, "view", 0, rows), draw(0, "noise", 0, rows)
    assert view.min() >= 0
    assert view.max() < 1
    counts = np.histogram(view, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 150  # chi-square with 99 degrees of freedom: p = 0.0007
    for other in (noise, draw(1, "view", 0, rows), draw(0, "view", 1, rows), np.roll(view, 1)):
        assert abs(np.corrcoef(view, other)[0, 1]) < 0.015  # 4.7 standard deviations


def test_an_epoch_is_a_permutation_and_each_is_another() -> None:
    orders = {(seed, epoch): epoch_order(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    for order in orders.values():
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders.values()}) == 4
    places = [np.flatnonzero(epoch_order(10, 0, epoch) == 3)[0] for epoch in range(2000)]
    assert np.bincount(places, minlength=10).min() > 140  # 200 each, if every place is as likely


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batches(world_size: int) -> None:
    order = epoch_order(103, seed=5, epoch=2)
    for step in range(steps_per_epoch(103, 8)):
        shares = [batch_rows(103, 8, 5, 2, step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(shares), order[step * 8 : (step + 1) * 8])


def test_the_remainder_of_an_epoch_is_dropped() -> None:
    assert steps_per_epoch(103, 8) == 12
    with pytest.raises(IndexError, match="step 12"):
        batch_rows(103, 8, 0, 0, step=12)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of the 3 ranks"):
        batch_rows(100, 8, 0, 0, 0, rank=0, world_size=3)
    with pytest.raises(ConfigError, match="rank 2"):
        batch_rows(100, 8, 0, 0, 0, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="batch_size"):
        steps_per_epoch(100, 0)
