"""The Fréchet distance against closed forms and against scipy's matrix square root; streaming moments."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torchmetrics.image.fid import _compute_fid

from rae.stages.scoring import frechet
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


@pytest.mark.parametrize("dim", [48, 160])
def test_the_quick_way_is_taken_and_agrees_with_both_libraries(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(dim)
    scales = np.exp(-np.linspace(0, 3, dim))
    a = rng.standard_normal((3 * dim, dim)) * scales
    b = rng.standard_normal((4 * dim, dim)) * scales[::-1] @ np.linalg.qr(rng.standard_normal((dim, dim)))[0] + 1
    first, second = Moments.of(a), Moments.of(b)
    theirs = fid_statistics_to_metric(
        {"mu": first.mean, "sigma": first.cov}, {"mu": second.mean, "sigma": second.cov}, verbose=False
    )["frechet_inception_distance"]
    tensors = [torch.from_numpy(array) for one in (first, second) for array in (one.mean, one.cov)]
    slowly = patched_away(monkeypatch, first, second)
    monkeypatch.setattr(np.linalg, "svd", None)
    quickly = frechet_distance(first, second)
    assert quickly == pytest.approx(slowly, rel=1e-7)
    assert quickly == pytest.approx(theirs, rel=1e-6)
    assert quickly == pytest.approx(float(_compute_fid(*tensors)), rel=1e-6)


def patched_away(monkeypatch: pytest.MonkeyPatch, a: Moments, b: Moments) -> float:
    """The distance by singular values alone."""
    with monkeypatch.context() as patch:
        patch.setattr(frechet, "_QUICK_ERROR", -1.0)
        return frechet_distance(a, b)


def test_nearly_singular_covariances_are_not_left_to_the_quick_way() -> None:
    """Many images, but half of the directions are rounding noise: the square root of an eigenvalue's error is large."""
    rng = np.random.default_rng(9)
    basis = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    scales = np.concatenate([np.ones(30), np.full(30, 1e-9)])
    a, b = (rng.standard_normal((200, 60)) * scales @ basis.T for _ in range(2))
    low = [(x @ basis)[:, :30] for x in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(through_sqrtm(*low), rel=1e-7)


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
