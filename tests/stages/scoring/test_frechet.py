"""The Fréchet distance against closed forms and against scipy's matrix square root; streaming moments."""

import numpy as np
import pytest
import scipy.linalg

from rae.stages.scoring.frechet import Moments, frechet_distance
from rae.store.errors import ConfigError, CorruptData, StaleInput


def with_moments(mean: np.ndarray, root: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` samples whose empirical mean and covariance are exactly `mean` and `root @ root.T` (count > dims)."""
    noise = rng.standard_normal((count, len(mean)))
    noise -= noise.mean(axis=0)
    white = np.linalg.qr(noise)[0] * np.sqrt(count - 1)
    return mean + white @ root.T


def through_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook computation, for covariances of full rank."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(axis=0) - b.mean(axis=0)
    return float(shift @ shift + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real))


def test_axis_aligned_gaussians_have_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    mean_a, mean_b = np.array([0.0, 1.0, -2.0]), np.array([3.0, 1.0, 2.0])
    deviation_a, deviation_b = np.array([1.0, 0.5, 2.0]), np.array([2.0, 0.1, 2.0])
    a = with_moments(mean_a, np.diag(deviation_a), 50, rng)
    b = with_moments(mean_b, np.diag(deviation_b), 70, rng)
    expected = np.square(mean_a - mean_b).sum() + np.square(deviation_a - deviation_b).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_correlated_gaussians_agree_with_the_matrix_square_root() -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((400, 24)) @ rng.standard_normal((24, 24)) + 5
    b = rng.standard_normal((300, 24)) @ rng.standard_normal((24, 24)) - 3
    assert frechet_distance(a, b) == pytest.approx(through_sqrtm(a, b), rel=1e-9)


def test_fewer_samples_than_dimensions_stay_exact() -> None:
    """Both sets live in the same 6 of 300 dimensions, where the distance is that of the 6-dimensional Gaussians."""
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.standard_normal((300, 6)))[0]
    a = rng.standard_normal((20, 6)) @ rng.standard_normal((6, 6))
    b = rng.standard_normal((25, 6)) @ rng.standard_normal((6, 6)) + 1
    assert frechet_distance(a @ basis.T, b @ basis.T) == pytest.approx(through_sqrtm(a, b), rel=1e-9)


def test_low_rank_covariances_agree_with_the_kernel_form() -> None:
    """tr (S1 S2)^(1/2) is the nuclear norm of A B^T / sqrt((n-1)(m-1)), A and B the centred features."""
    rng = np.random.default_rng(3)
    a = rng.standard_normal((30, 512)).astype(np.float32) * 4
    b = rng.standard_normal((40, 512)).astype(np.float32)
    centred_a, centred_b = (x.astype(np.float64) - x.mean(axis=0, dtype=np.float64) for x in (a, b))
    overlap = np.linalg.norm(centred_a @ centred_b.T, "nuc") / np.sqrt(29 * 39)
    spread = np.square(centred_a).sum() / 29 + np.square(centred_b).sum() / 39
    shift = np.square(a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)).sum()
    assert frechet_distance(a, b) == pytest.approx(shift + spread - 2 * overlap, rel=1e-9)


def test_a_set_is_at_distance_zero_from_itself_even_when_rank_is_short() -> None:
    features = np.random.default_rng(4).standard_normal((50, 256)) * 10
    assert 0 <= frechet_distance(features, features) < 1e-8 * np.square(features).sum(axis=1).mean()
    assert frechet_distance(features, features + 2.0) == pytest.approx(256 * 4, rel=1e-9)


def test_identical_images_are_a_point() -> None:
    point = np.full((10, 4), 3.0)
    assert frechet_distance(point, np.zeros((10, 4))) == pytest.approx(36)


def test_moments_agree_with_numpy_far_from_the_origin_for_any_batches() -> None:
    features = (np.random.default_rng(5).standard_normal((257, 16)) + 1e4).astype(np.float32)
    cov = np.cov(features.astype(np.float64), rowvar=False)
    for batch in (1, 7, 64, 257):
        moments = Moments(16)
        for start in range(0, len(features), batch):
            moments.update(features[start : start + batch])
        assert moments.count == 257
        np.testing.assert_allclose(moments.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-14)
        np.testing.assert_allclose(moments.cov, cov, rtol=1e-9, atol=1e-10)


def test_moments_merge_in_any_order() -> None:
    features = np.random.default_rng(6).standard_normal((90, 8)) + 100
    parts = [Moments.of(part) for part in np.split(features, [1, 40, 41])] + [Moments(8)]
    whole = Moments.of(features)
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]):
        merged = Moments(8)
        for i in order:
            merged.merge(parts[i])
        assert merged.count == whole.count
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(merged.cov, whole.cov, rtol=1e-10, atol=1e-12)
    assert [part.count for part in parts] == [1, 39, 1, 49, 0], "merging leaves the parts alone"


def test_bad_features_are_named() -> None:
    moments = Moments(2).update(np.zeros((5, 2)))
    with pytest.raises(CorruptData, match="image 6 "):
        moments.update(np.array([[0.0, 0.0], [np.nan, 0.0], [0.0, np.inf]]))
    assert moments.count == 5
    with pytest.raises(ConfigError, match="at least 2 images, got 1"):
        frechet_distance(np.zeros((1, 2)), np.zeros((5, 2)))
    with pytest.raises(StaleInput, match="3 dimensions"):
        frechet_distance(np.zeros((5, 2)), np.zeros((5, 3)))
    with pytest.raises(StaleInput):
        Moments(2).merge(Moments(3))
