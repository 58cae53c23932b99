"""Statistics are those of numpy on the whole array in float64, and the same bits however they were come by."""

from pathlib import Path

import numpy as np
import pytest

from rae.store.errors import CorruptData, MissingInput
from rae.store.stats import LatentStats, Moments, RunningStats, merge

SHAPE = (6, 3, 4)


def moments(latents: np.ndarray) -> Moments:
    running = RunningStats(latents.shape[1:])
    for latent in latents:
        running.add(latent)
    return running.moments()


def assert_exact(found: Moments, latents: np.ndarray) -> None:
    whole = latents.astype(np.float64)
    assert found.count == len(latents)
    np.testing.assert_allclose(found.mean, whole.mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.m2 / found.count, whole.var(0), rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 1.0), (1000.0, 2.0), (-30.0, 0.05)])
def test_merged_parts_equal_numpy_on_the_whole(dtype: str, mean: float, deviation: float) -> None:
    latents = np.random.default_rng(0).normal(mean, deviation, (700, *SHAPE)).astype(dtype)
    parts = np.split(latents, [1, 2, 130, 500])
    merged = merge(moments(part) for part in parts)
    assert merged is not None
    assert_exact(merged, latents)
    assert_exact(moments(latents), latents)


def test_a_mean_far_larger_than_the_deviation_does_not_cancel() -> None:
    latents = (1e6 + np.random.default_rng(0).normal(0, 1e-1, (500, *SHAPE))).astype(np.float32)
    assert_exact(moments(latents), latents)


def test_constants_have_no_variance() -> None:
    assert not moments(np.full((100, *SHAPE), 0.1, np.float16)).m2.any()


def test_bits_do_not_depend_on_who_counts_or_on_memory_layout() -> None:
    latents = np.random.default_rng(1).normal(size=(50, *SHAPE)).astype(np.float16)
    strided = np.asfortranarray(np.repeat(latents, 2, axis=0)[::2])
    assert moments(latents).identical(moments(strided))
    assert not moments(latents).identical(moments(latents[::-1]))  # so the order of a part's rows is part of the law


def test_empty_parts_change_nothing() -> None:
    some = moments(np.random.default_rng(2).normal(size=(9, *SHAPE)))
    none = RunningStats(SHAPE).moments()
    assert none.count == 0
    merged = merge([none, some, none])
    assert merged is not None
    assert merged.identical(some)
    assert merge([]) is None


def test_files_give_back_the_same_bits(tmp_path: Path) -> None:
    some = moments(np.random.default_rng(3).normal(size=(9, *SHAPE)))
    (tmp_path / "moments.npz").write_bytes(some.to_bytes())
    assert Moments.load(tmp_path / "moments.npz").identical(some)
    assert some.to_bytes() == some.to_bytes()
    stats = LatentStats.of(some)
    (tmp_path / "stats.npz").write_bytes(stats.to_bytes())
    loaded = LatentStats.load(tmp_path / "stats.npz")
    assert loaded.count == 9
    assert np.array_equal(loaded.mean, some.mean)
    assert np.array_equal(loaded.variance, some.m2 / 9)


def test_whitening_is_the_formula_in_float32() -> None:
    latents = np.random.default_rng(4).normal(5, 3, (64, *SHAPE)).astype(np.float16)
    stats = LatentStats.of(moments(latents))
    whitened = stats.whiten(latents)
    expected = (latents.astype(np.float64) - stats.mean) / np.sqrt(stats.variance + 1e-5)
    assert whitened.dtype == np.float32
    np.testing.assert_allclose(whitened, expected, atol=2e-6)
    assert np.array_equal(stats.whiten(latents[3]), whitened[3])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    with pytest.raises(MissingInput, match=r"stats\.npz"):
        LatentStats.load(path)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(CorruptData, match=r"stats\.npz"):
        LatentStats.load(path)
    path.write_bytes(moments(np.ones((2, *SHAPE))).to_bytes())
    with pytest.raises(CorruptData, match="variance"):
        LatentStats.load(path)
    np.savez(path, mean=np.array([object()]), variance=1, count=1)  # a pickle
    with pytest.raises(CorruptData, match=r"stats\.npz"):
        LatentStats.load(path)
