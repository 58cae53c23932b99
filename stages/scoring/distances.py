"""Scores of features that are no Fréchet distance: the Inception Score and the kernel distance, by torch-fidelity."""

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import kernel_mmd

from rae.stages.scoring.feature_rows import FeatureRows, as_rows, check_finite
from rae.store.errors import ConfigError, StaleInput

_KID_SUBSETS = 100
_IS_SPLITS = 10
_SEED = 2020  # torch-fidelity's, so that its scores are these


def inception_score(features: FeatureRows | NDArray[Any], head: NDArray[np.float32]) -> tuple[float, float]:
    """The Inception Score, 1 or more, and its standard deviation over ten splits (Salimans et al. 2016, section 4).

    From Inception's features [N, D] and its `head` [C, D], whose bias is left out as by the authors' code. Images are
    shuffled before they are split, as torch-fidelity does. Raises ConfigError for fewer images than splits.
    """
    rows = as_rows(features)
    if len(rows) < _IS_SPLITS:
        raise ConfigError(f"An Inception Score in {_IS_SPLITS} splits needs as many images, got {len(rows)}.")
    check_finite(rows)
    order = np.random.RandomState(_SEED).permutation(len(rows))
    ends = np.arange(_IS_SPLITS + 1) * len(rows) // _IS_SPLITS
    scores = []
    for first, end in itertools.pairwise(ends):
        logits = torch.from_numpy(rows.take(order[first:end]).astype(np.float32) @ head.T)
        scores.append(isc_features_to_metric(logits, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN])
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    generated: FeatureRows | NDArray[Any], reference: FeatureRows | NDArray[Any], subset_size: int = 1000
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018, arXiv:1801.01401) and its standard deviation over 100 random subsets.

    The unbiased squared MMD of features [N, D] and [M, D] with the kernel (x y / D + 1)^3, in float64; it may be
    slightly negative. The subsets are torch-fidelity's. Raises ConfigError if a set has fewer than `subset_size`
    images, StaleInput if the dimensions differ.
    """
    ours, theirs = as_rows(generated), as_rows(reference)
    if ours.dim != theirs.dim:
        raise StaleInput(f"Features of {ours.dim} and of {theirs.dim} dimensions cannot be compared.")
    if min(len(ours), len(theirs)) < subset_size or subset_size < 2:
        raise ConfigError(
            f"A kernel distance over subsets of {subset_size} needs that many images in each set, and at least 2, got"
            f" {len(ours)} generated and {len(theirs)} of the reference."
        )
    check_finite(ours)
    check_finite(theirs)
    rng = np.random.RandomState(_SEED)
    distances = []
    for _ in range(_KID_SUBSETS):
        chosen = [rng.choice(len(rows), subset_size, replace=False) for rows in (ours, theirs)]
        a, b = (rows.take(some).astype(np.float64) for rows, some in zip((ours, theirs), chosen, strict=True))
        distances.append(kernel_mmd(a, b))
    return float(np.mean(distances)), float(np.std(distances))
