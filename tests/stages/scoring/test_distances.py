"""The Inception Score and the kernel distance against closed forms and torchmetrics; bad input has a sentence."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from rae.stages.scoring.distances import inception_score, kernel_distance
from rae.store.errors import ConfigError, CorruptData, StaleInput

RNG = np.random.default_rng(0)
HEAD = RNG.standard_normal((30, 8)).astype(np.float32)


def test_the_inception_score_is_the_exponent_of_the_mutual_information() -> None:
    """Ten classes, each image sure of its own: IS is 10. All images alike: IS is 1."""
    sure = np.eye(10, dtype=np.float32).repeat(100, axis=0)
    shuffled_by_chance = inception_score(sure, 50 * np.eye(10, dtype=np.float32))[0]
    assert shuffled_by_chance == pytest.approx(10, rel=0.06), "classes are not balanced in every split"
    assert inception_score(np.ones((50, 10)), np.eye(10, dtype=np.float32)) == (pytest.approx(1), pytest.approx(0))


def test_the_inception_score_is_torch_fidelitys_and_an_own_computation_agrees() -> None:
    features = RNG.standard_normal((207, 8)).astype(np.float32)
    mean, deviation = inception_score(features, HEAD)
    theirs = isc_features_to_metric(torch.from_numpy(features @ HEAD.T))
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6)
    logits = (features.astype(np.float64) @ HEAD.T.astype(np.float64))[np.random.RandomState(2020).permutation(207)]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = []
    for split in range(10):
        part = p[split * 207 // 10 : (split + 1) * 207 // 10]
        scores.append(np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()))
    assert mean == pytest.approx(np.mean(scores), rel=1e-6)


def test_the_kernel_distance_over_whole_sets_is_the_unbiased_mmd() -> None:
    a, b = RNG.standard_normal((40, 6)), RNG.standard_normal((40, 6)) + 0.5

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.array([[(p @ q / 6 + 1) ** 3 for q in y] for p in x])

    within = sum(k[~np.eye(40, dtype=bool)].sum() for k in (kernel(a, a), kernel(b, b))) / (40 * 39)
    found, deviation = kernel_distance(a, b, subset_size=40)
    assert found == pytest.approx(within - 2 * kernel(a, b).mean(), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_the_kernel_distance_over_subsets_is_torch_fidelitys() -> None:
    a, b = RNG.standard_normal((1500, 16)), RNG.standard_normal((1200, 16)) * 1.3
    theirs = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subset_size=100, verbose=False)
    mean, deviation = kernel_distance(a, b, subset_size=100)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_too_few_images_other_dimensions_and_features_not_finite_are_refused() -> None:
    features = RNG.standard_normal((20, 8))
    with pytest.raises(ConfigError, match="in 10 splits needs as many images, got 9"):
        inception_score(features[:9], HEAD)
    with pytest.raises(ConfigError, match="got 20 generated and 5 of the reference"):
        kernel_distance(features, features[:5], subset_size=10)
    with pytest.raises(StaleInput, match="8 and of 4 dimensions"):
        kernel_distance(features, features[:, :4], subset_size=10)
    features[13, 2] = np.inf
    with pytest.raises(CorruptData, match="image 13 are not finite"):
        kernel_distance(features, features, subset_size=10)
    with pytest.raises(CorruptData, match="image 13 are not finite"):
        inception_score(features, HEAD)
