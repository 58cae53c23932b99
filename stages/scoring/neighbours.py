"""Precision and recall of generated images, from nearest neighbours in feature space."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae.store.errors import ConfigError, StaleInput

_BLOCK_ENTRIES = 2**24  # distances held at a time: 128 MiB of float64


def precision_recall(real: NDArray[Any], generated: NDArray[Any], k: int = 3) -> tuple[float, float]:
    """Improved precision and recall, each in [0, 1] (Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2).

    A set's manifold is the union of balls around its points, each reaching to the point's `k`-th nearest neighbour
    within the set. Precision is the share of `generated` [M, D] inside the manifold of `real` [N, D] (do the images
    look real), recall the share of `real` inside that of `generated` (is every kind of real image made).

    Raises ConfigError unless both sets have more than `k` images, StaleInput if their dimensions differ.
    """
    if real.shape[1] != generated.shape[1]:
        raise StaleInput(f"Features of {real.shape[1]} and of {generated.shape[1]} dimensions cannot be compared.")
    if min(len(real), len(generated)) <= k:
        raise ConfigError(
            f"Precision and recall with the {k} nearest neighbours need at least {k + 1} images in each set,"
            f" got {len(real)} real and {len(generated)} generated."
        )
    # Distances do not change with the origin; near the data, their float64 expansion cancels least.
    origin = real.mean(axis=0, dtype=np.float64)
    real, generated = real - origin, generated - origin
    return _share_inside(generated, real, k), _share_inside(real, generated, k)


def _share_inside(points: NDArray[np.float64], manifold: NDArray[np.float64], k: int) -> float:
    """Share of `points` within the k-nearest-neighbour balls of `manifold`."""
    # Every point is its own nearest neighbour, so the k-th other one stands at index k.
    radii = np.concatenate([np.partition(block, k, axis=1)[:, k] for block in _squared_distances(manifold, manifold)])
    inside = sum(int((block <= radii).any(axis=1).sum()) for block in _squared_distances(points, manifold))
    return inside / len(points)


def _squared_distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Squared distances [rows, len(b)], a block of rows of `a` at a time.

    Below the rounding error of |x|^2 + |y|^2 - 2xy two points count as equal. Otherwise it would be chance whether a
    point lies in a ball of radius zero, which is what a repeated image has.
    """
    norms_a, norms_b = np.square(a).sum(axis=1), np.square(b).sum(axis=1)
    noise = a.shape[1] * np.finfo(np.float64).eps
    rows = max(1, _BLOCK_ENTRIES // len(b))
    for start in range(0, len(a), rows):
        scale = norms_a[start : start + rows, None] + norms_b
        squared = scale - 2 * (a[start : start + rows] @ b.T)
        squared[squared <= noise * scale] = 0.0
        yield squared
