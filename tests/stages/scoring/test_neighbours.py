"""Precision, recall, density and coverage on sets whose answer is known, and against scikit-learn's neighbours."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from rae.stages.scoring import feature_rows
from rae.stages.scoring.neighbours import Manifold, Prdc
from rae.store.errors import ConfigError, CorruptData, StaleInput


def prdc(real: np.ndarray, generated: np.ndarray, k: int = 3) -> Prdc:
    return Manifold(real, k).judge(generated)


def through_sklearn(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, ...]:
    def share_inside(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(manifold).kneighbors()[0][:, -1]
        distances = np.linalg.norm(points[:, None] - manifold, axis=2)
        return float((distances <= radii).any(axis=1).mean())

    radii = NearestNeighbors(n_neighbors=k).fit(real).kneighbors()[0][:, -1]
    nearest = NearestNeighbors(n_neighbors=1).fit(generated).kneighbors(real)[0][:, 0]
    density = np.mean([sum(np.linalg.norm(real - one, axis=1) <= radii) for one in generated]) / k
    return share_inside(generated, real), share_inside(real, generated), density, float((nearest <= radii).mean())


def clusters(*centres: float, each: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([rng.standard_normal((each, 5)) * 0.1 + centre for centre in centres])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_agrees_with_scikit_learn(k: int) -> None:
    rng = np.random.default_rng(k)
    real, generated = rng.standard_normal((80, 6)), rng.standard_normal((60, 6)) * 0.7 + 1
    expected = through_sklearn(real, generated, k)
    assert prdc(real, generated, k) == pytest.approx(expected)
    assert all(0 < value < 1 for value in expected), "an answer that could be wrong"


def test_a_lost_mode_costs_recall_alone() -> None:
    rng = np.random.default_rng(0)
    real = clusters(0, 50, each=200, rng=rng)
    precision, recall, *_ = prdc(real, clusters(0, each=200, rng=rng))
    assert precision > 0.9
    assert 0.4 < recall <= 0.5


def test_an_invented_mode_costs_precision_alone() -> None:
    rng = np.random.default_rng(0)
    real = clusters(0, each=200, rng=rng)
    precision, recall, *_ = prdc(real, clusters(0, 50, each=200, rng=rng))
    assert 0.4 < precision <= 0.5
    assert recall > 0.9


def test_a_set_covers_itself_and_nothing_far_away() -> None:
    real = np.random.default_rng(1).standard_normal((40, 8)).astype(np.float32)
    assert prdc(real, real.copy()) == (1.0, 1.0, pytest.approx(1, abs=0.5), 1.0)
    assert prdc(real, real + 100) == (0.0, 0.0, 0.0, 0.0)


def test_repeated_images_have_balls_of_radius_zero() -> None:
    """Ten real points, each generated ten times over: all of them real, and each covers nothing but itself."""
    points = np.random.default_rng(2).standard_normal((100, 1280)).astype(np.float32) + 7
    generated = np.repeat(points[:10], 10, axis=0)
    assert prdc(points, generated)[:2] == (1.0, 0.1)


def test_answer_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    real, generated = rng.standard_normal((70, 4)), rng.standard_normal((50, 4)) + 0.5
    whole = prdc(real, generated)
    for rows in (1, 3, 32):
        monkeypatch.setattr(feature_rows, "CHUNK_ROWS", rows)
        assert prdc(real, generated) == whole


def test_features_that_are_not_finite_are_named() -> None:
    features = np.zeros((10, 2))
    features[7, 1] = np.nan
    with pytest.raises(CorruptData, match="image 7 are not finite"):
        prdc(np.zeros((10, 2)), features)


def test_too_few_images_and_other_features_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 4 images in each set, got 3 generated"):
        prdc(np.zeros((10, 2)), np.zeros((3, 2)))
    with pytest.raises(StaleInput, match="2 and of 5 dimensions"):
        prdc(np.zeros((10, 2)), np.zeros((10, 5)))
