"""Precision, recall, density and coverage of generated images, from nearest neighbours in feature space."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rae.stages.scoring.feature_rows import FeatureRows, as_rows, check_finite
from rae.store.errors import ConfigError, StaleInput


class Prdc(NamedTuple):
    """What the `k` nearest neighbours say of generated images; all in [0, 1], density in [0, inf)."""

    precision: float
    recall: float
    density: float
    coverage: float


class Manifold:
    """The balls around real images' features [N, D], each reaching to the `k`-th nearest other image.

    They are found once, whatever is then judged by them. Raises ConfigError unless there are more than `k` images,
    CorruptData for features that are not finite.
    """

    def __init__(self, real: FeatureRows | NDArray[Any], k: int = 3) -> None:
        self._real, self._k = as_rows(real), k
        _check_count(self._real, k, "real")
        check_finite(self._real)
        # Distances do not change with the origin; near the data, their float64 expansion cancels least.
        total = sum((chunk.sum(axis=0, dtype=np.float64) for chunk in self._real), np.zeros(self._real.dim))
        self._origin = total / len(self._real)
        self._radii = _radii(self._real, self._origin, k)

    def judge(self, generated: FeatureRows | NDArray[Any]) -> Prdc:
        """Improved precision and recall, density and coverage of `generated` [M, D].

        Precision is the share of generated images inside the real balls (do the images look real), recall the share of
        real ones inside those of the generated (is every kind of real image made): Kynkäänniemi et al. 2019,
        arXiv:1904.06991, equations 1 and 2. Density counts the real balls around each generated image, divided by `k`;
        coverage is the share of real balls that hold a generated image: Naeem et al. 2020, arXiv:2002.09797, equations
        4 and 6. Outliers sway these two less.

        Raises ConfigError unless there are more than `k` images, StaleInput if the dimensions differ, CorruptData for
        features that are not finite.
        """
        fakes = as_rows(generated)
        if self._real.dim != fakes.dim:
            raise StaleInput(f"Features of {self._real.dim} and of {fakes.dim} dimensions cannot be compared.")
        _check_count(fakes, self._k, "generated")
        check_finite(fakes)
        fake_radii = _radii(fakes, self._origin, self._k)
        balls = np.zeros(len(fakes), np.int64)  # of real images, around each generated one
        recalled, covered = np.zeros(len(self._real), np.bool_), np.zeros(len(self._real), np.bool_)
        for these, fake in _located(fakes, self._origin):
            for those, real in _located(self._real, self._origin):
                squared = _squared_distances(fake, real)
                in_real_balls = squared <= self._radii[those]
                balls[these] += in_real_balls.sum(axis=1)
                covered[those] |= in_real_balls.any(axis=0)
                recalled[those] |= (squared <= fake_radii[these, None]).any(axis=0)
        return Prdc(
            precision=float((balls > 0).mean()),
            recall=float(recalled.mean()),
            density=float(balls.mean()) / self._k,
            coverage=float(covered.mean()),
        )


def _check_count(features: FeatureRows, k: int, what: str) -> None:
    if len(features) <= k:
        raise ConfigError(
            f"Precision and recall with the {k} nearest neighbours need at least {k + 1} images in each set,"
            f" got {len(features)} {what} ones."
        )


def _radii(manifold: FeatureRows, origin: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Squared distance [N] of every point to its `k`-th nearest other one."""
    radii = np.empty(len(manifold))
    for these, points in _located(manifold, origin):
        nearest = np.empty((len(points), 0))
        for _, others in _located(manifold, origin):
            found = np.concatenate([nearest, _squared_distances(points, others)], axis=1)
            # Every point is its own nearest neighbour, so the k-th other one stands at index k.
            nearest = np.partition(found, k, axis=1)[:, : k + 1] if found.shape[1] > k else found
        radii[these] = nearest[:, k]
    return radii


def _located(features: FeatureRows, origin: NDArray[np.float64]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Chunks of features relative to `origin`, in float64, with their place."""
    first = 0
    for chunk in features:
        yield slice(first, first + len(chunk)), chunk - origin
        first += len(chunk)


def _squared_distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distances [len(a), len(b)].

    Below the rounding error of |x|^2 + |y|^2 - 2xy two points count as equal. Otherwise it would be chance whether a
    point lies in a ball of radius zero, which is what a repeated image has.
    """
    scale = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)
    squared: NDArray[np.float64] = scale - 2 * (a @ b.T)
    squared[squared <= a.shape[1] * np.finfo(np.float64).eps * scale] = 0.0
    return squared
