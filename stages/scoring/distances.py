"""Scores of features that are no Fréchet distance: the Inception Score and the kernel distance, by torch-fidelity."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from rae.store.errors import ConfigError, CorruptData, StaleInput

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLITS = 10


def inception_score(
    features: NDArray[Any], head: NDArray[np.float32], splits: int = IS_SPLITS, seed: int = 2020
) -> tuple[float, float]:
    """The Inception Score, 1 or more, and its standard deviation over `splits` (Salimans et al. 2016, section 4).

    From Inception's features [N, D] and its `head` [C, D], whose bias is left out as by the authors' code. Images are
    shuffled with `seed` before they are split. Raises ConfigError for fewer images than splits.
    """
    if len(features) < splits:
        raise ConfigError(f"An Inception Score in {splits} splits needs at least {splits} images, got {len(features)}.")
    check_finite(features)
    logits = torch.from_numpy(np.asarray(features, np.float32) @ head.T)
    found = isc_features_to_metric(logits, splits, True, seed)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def kernel_distance(
    generated: NDArray[Any], reference: NDArray[Any], subset_size: int = KID_SUBSET_SIZE, seed: int = 2020
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018, arXiv:1801.01401) and its standard deviation over 100 random subsets.

    The unbiased squared MMD of features [N, D] and [M, D] with the kernel (x y / D + 1)^3; it may be slightly negative.
    Raises ConfigError if a set has fewer than `subset_size` images, StaleInput if the dimensions differ.
    """
    if generated.shape[1] != reference.shape[1]:
        raise StaleInput(f"Features of {generated.shape[1]} and of {reference.shape[1]} dimensions cannot be compared.")
    if min(len(generated), len(reference)) < subset_size or subset_size < 2:
        raise ConfigError(
            f"A kernel distance over subsets of {subset_size} needs that many images in each set, and at least 2, got"
            f" {len(generated)} generated and {len(reference)} of the reference."
        )
    for features in (generated, reference):
        check_finite(features)
    found = kid_features_to_metric(
        # In float64: the kernel's cubes of float32 would cost half of its digits.
        torch.from_numpy(np.asarray(generated, np.float64)),
        torch.from_numpy(np.asarray(reference, np.float64)),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=subset_size,
        rng_seed=seed,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def check_finite(features: NDArray[Any]) -> None:
    """Raises CorruptData, with the place of the first image whose features are not finite."""
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise CorruptData(f"The features of image {int(np.argmin(finite))} are not finite (counted from 0).")
