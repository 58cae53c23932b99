"""Precision, recall, density and coverage of generated images, from nearest neighbours in feature space."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rae.stages.scoring.distances import check_finite
from rae.store.errors import ConfigError, StaleInput

_BLOCK_ENTRIES = 2**24  # distances held at a time: 128 MiB of float64


class Prdc(NamedTuple):
    """What the `k` nearest neighbours say of generated images; all in [0, 1], density in [0, inf)."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: NDArray[Any], generated: NDArray[Any], k: int = 3) -> Prdc:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2), density and
    coverage (Naeem et al. 2020, arXiv:2002.09797, equations 4 and 6) of `generated` [M, D] against `real` [N, D].

    A set's manifold is the union of balls around its points, each reaching to the point's `k`-th nearest neighbour
    within the set. Precision is the share of generated images inside the manifold of the real ones (do the images look
    real), recall the share of real ones inside that of the generated (is every kind of real image made). Density
    counts the real balls around each generated image, divided by `k`; coverage is the share of real balls that hold a
    generated image. Outliers among the real images sway these two less.

    Raises ConfigError unless both sets have more than `k` images, StaleInput if their dimensions differ, CorruptData
    for features that are not finite.
    """
    if real.shape[1] != generated.shape[1]:
        raise StaleInput(f"Features of {real.shape[1]} and of {generated.shape[1]} dimensions cannot be compared.")
    if min(len(real), len(generated)) <= k:
        raise ConfigError(
            f"Precision and recall with the {k} nearest neighbours need at least {k + 1} images in each set,"
            f" got {len(real)} real and {len(generated)} generated."
        )
    for features in (real, generated):
        check_finite(features)
    # Distances do not change with the origin; near the data, their float64 expansion cancels least.
    origin = real.mean(axis=0, dtype=np.float64)
    real, generated = real - origin, generated - origin
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    balls_around_generated = np.empty(len(generated), np.int64)
    inside_recalled = np.zeros(len(real), np.bool_)
    covered = np.zeros(len(real), np.bool_)
    first = 0
    for block in _squared_distances(generated, real):
        rows = slice(first, first + len(block))
        in_real_balls = block <= real_radii
        balls_around_generated[rows] = in_real_balls.sum(axis=1)
        covered |= in_real_balls.any(axis=0)
        inside_recalled |= (block <= generated_radii[rows, None]).any(axis=0)
        first += len(block)
    return Prdc(
        precision=float((balls_around_generated > 0).mean()),
        recall=float(inside_recalled.mean()),
        density=float(balls_around_generated.mean()) / k,
        coverage=float(covered.mean()),
    )


def _radii(manifold: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Squared distance [N] of every point to its `k`-th nearest other one."""
    # Every point is its own nearest neighbour, so the k-th other one stands at index k.
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for block in _squared_distances(manifold, manifold)])


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
