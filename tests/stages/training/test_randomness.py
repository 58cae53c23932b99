import math

import numpy as np
import pytest
import torch

from rae.stages.training.randomness import normal, uniform
from rae.store.order import _splitmix64, row_seeds


def test_a_rows_noise_does_not_depend_on_its_batch():
    whole = normal((3, 5, 5), 7, "noise", 2, [4, 9, 1000])
    assert whole.shape == (3, 3, 5, 5)
    assert whole.dtype == torch.float32
    for position, row in enumerate([4, 9, 1000]):
        assert torch.equal(normal((3, 5, 5), 7, "noise", 2, np.array([row]))[0], whole[position])


def test_every_part_of_the_address_changes_the_draw():
    first = normal((8,), 0, "noise", 0, [0])
    for other in [(1, "noise", 0, [0]), (0, "time", 0, [0]), (0, "noise", 1, [0]), (0, "noise", 0, [1])]:
        assert not torch.equal(normal((8,), *other), first)


def test_normal_numbers_are_box_and_mullers_of_splitmix64():
    (start,) = row_seeds(7, "noise", 2, np.array([9])).tolist()
    bits = _splitmix64(start, np.arange(8))
    radius = np.sqrt(-2 * np.log(((bits >> np.uint64(32)) + np.uint64(1)) * 2.0**-32))
    angle = 2 * np.pi * (bits & np.uint64(0xFFFFFFFF)) * 2.0**-32
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    np.testing.assert_allclose(normal((15,), 7, "noise", 2, [9])[0], expected[:15], atol=1e-5)


def test_rows_whose_seeds_share_their_lower_half_share_no_noise():
    """A generator that takes 32 bits of a seed would repeat itself among as many images as an FID is taken of."""
    lower = row_seeds(0, "sample", 0, np.arange(200_000)) & np.uint64(0xFFFFFFFF)
    order = np.argsort(lower)
    alike = np.flatnonzero(np.diff(lower[order]) == 0)
    assert len(alike)
    for place in alike:
        first, second = normal((64,), 0, "sample", 0, order[place : place + 2])
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_numbers():
    places = ((768, 16, 16), 3, "noise", 1, range(70))
    torch.testing.assert_close(normal(*places, "cuda").cpu(), normal(*places), atol=1e-5, rtol=0)


def test_pytorchs_global_generator_is_left_alone():
    torch.manual_seed(0)
    asked = torch.rand(3)
    torch.manual_seed(0)
    normal((4,), 0, "noise", 0, [1, 2])
    uniform(0, "time", 0, [1, 2])
    assert torch.equal(torch.rand(3), asked)


def test_normal_numbers_are_standard_normal():
    one_each = normal((), 0, "time", 0, range(20_000))  # across rows
    many = normal((20_000,), 0, "noise", 0, [3])[0]  # within a row
    for numbers in (one_each, many):
        assert abs(numbers.mean()) < 4 / math.sqrt(20_000)
        assert abs(numbers.var() - 1) < 4 * math.sqrt(2 / 20_000)
        assert abs((numbers.abs() < 1).float().mean() - 0.6827) < 0.014


def test_uniform_numbers_are_uniform_and_below_one():
    numbers = uniform(0, "drop", 3, range(20_000))
    assert numbers.dtype == torch.float32
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert np.abs(np.histogram(numbers, 10, (0, 1))[0] - 2000).max() < 4 * math.sqrt(1800)
    assert torch.equal(uniform(0, "drop", 3, [17]), numbers[17:18])
