"""The Fréchet distance between two sets of features, and the moments that it is computed from.

FID (Heusel et al. 2017, arXiv:1706.08500, equation 6) is this distance on Inception features.
"""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rae.stages.scoring.feature_rows import FeatureRows, as_rows
from rae.store.errors import ConfigError, CorruptData, StaleInput

_QUICK_ERROR = 1e-7  # of the distance: what the quick way may cost in accuracy
_ROUNDINGS = 4  # units in the last place of the largest eigenvalue by which any may be off


class Moments:
    """Mean and covariance of features that arrive in batches, in float64.

    Batches are merged with the pairwise update of Chan et al. (1983), which does not cancel for features far from
    zero. The order and size of the batches change the last bits only.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean: NDArray[np.float64] = np.zeros(dim)
        self._scatter: NDArray[np.float64] = np.zeros((dim, dim))  # sum of outer products of deviations from the mean

    @classmethod
    def of(cls, features: FeatureRows | NDArray[Any]) -> Self:
        """The moments of features [N, D], a chunk in memory at a time; raises as `update` does."""
        rows = as_rows(features)
        moments = cls(rows.dim)
        for chunk in rows:
            moments.update(chunk)
        return moments

    @classmethod
    def given(cls, mean: NDArray[np.float64], cov: NDArray[np.float64], count: int | None) -> Self:
        """Moments that are known already, mean [D] and covariance [D, D]; `count` None is more than D, as one hopes."""
        moments = cls(len(mean))
        moments.count, moments.mean = count or len(mean) + 1, mean
        moments._scatter = cov * (moments.count - 1)
        return moments

    @property
    def dim(self) -> int:
        """Number of features, D."""
        return self.mean.size

    @property
    def cov(self) -> NDArray[np.float64]:
        """Covariance [D, D], divided by N - 1. Raises ConfigError for fewer than two samples."""
        if self.count < 2:
            raise ConfigError(f"A covariance needs at least 2 images, got {self.count}.")
        return self._scatter / (self.count - 1)

    def update(self, features: NDArray[Any]) -> Self:
        """Takes in features [N, D]. Raises CorruptData for one that is not finite, StaleInput for another D."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise StaleInput(f"Features of shape {features.shape} do not fit moments of {self.dim} dimensions.")
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            bad = self.count + int(np.argmin(finite))
            raise CorruptData(f"The features of image {bad} are not finite (counted from 0).")
        if len(features):
            mean = features.mean(axis=0, dtype=np.float64)
            deviations = features - mean
            self._absorb(len(features), mean, deviations.T @ deviations)
        return self

    def merge(self, other: "Moments") -> Self:
        """Takes in what `other` has seen. Raises StaleInput if its dimension differs."""
        if other.dim != self.dim:
            raise StaleInput(f"Moments of {other.dim} dimensions do not fit moments of {self.dim} dimensions.")
        if other.count:
            self._absorb(other.count, other.mean, other._scatter)
        return self

    def _absorb(self, count: int, mean: NDArray[np.float64], scatter: NDArray[np.float64]) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self._scatter = self._scatter + scatter + np.outer(shift, shift) * (self.count * count / total)
        self.count = total


def frechet_distance(a: Moments | FeatureRows | NDArray[Any], b: Moments | FeatureRows | NDArray[Any]) -> float:
    """Squared Fréchet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians, at least 0, in float64.

    `a` and `b` are moments or features [N, D]. With S = R R^T, the trace of (S1 S2)^(1/2) is the nuclear norm of
    R1^T R2, the sum of its singular values: exact with fewer samples than dimensions, where a matrix square root of
    S1 S2 is not.

    Raises ConfigError for fewer than two samples, StaleInput if the dimensions differ, CorruptData for features that
    are not finite.
    """
    a = a if isinstance(a, Moments) else Moments.of(a)
    b = b if isinstance(b, Moments) else Moments.of(b)
    if a.dim != b.dim:
        raise StaleInput(f"Features of {a.dim} and of {b.dim} dimensions cannot be compared.")
    cov_a, cov_b = a.cov, b.cov
    shift = a.mean - b.mean
    apart = float(shift @ shift + np.trace(cov_a) + np.trace(cov_b))
    factors = _cholesky(cov_a, cov_b) if min(a.count, b.count) > a.dim else None
    if factors is not None:
        # Their diagonals stand for their singular values: a guess at whether the quick way is worth trying.
        guess = np.prod([np.sort(np.diag(lower)) for lower in factors], axis=0)
        if _error(guess) < _QUICK_ERROR * apart:
            squares = np.linalg.eigvalsh(factors[0].T @ cov_b @ factors[0])
            roots = np.sqrt(squares.clip(np.finfo(np.float64).tiny))
            distance = float(apart - 2 * roots.sum())
            if _error(roots) < _QUICK_ERROR * distance:
                return distance
    left, right = factors or (_root(cov_a), _root(cov_b))
    overlap = float(np.linalg.svd(left.T @ right, compute_uv=False).sum())
    return max(0.0, apart - 2 * overlap)


def _cholesky(cov_a: NDArray[np.float64], cov_b: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """L with L L^T = S of both, or None if one has not full rank: a third of the work of eigenvectors."""
    try:
        return np.linalg.cholesky(cov_a), np.linalg.cholesky(cov_b)
    except np.linalg.LinAlgError:
        return None


def _error(roots: NDArray[Any]) -> float:
    """A bound on the error of twice tr (S1 S2)^(1/2) from the eigenvalues `roots`^2 of L1^T S2 L1, S1 = L1 L1^T.

    They take a third of the time of the singular values of L1^T L2. But an eigenvalue is known up to a rounding error
    of the largest one, of which the square root makes much where it is nearly zero.
    """
    return float((_ROUNDINGS * np.finfo(np.float64).eps * roots.max() ** 2 / roots).sum())


def _root(cov: NDArray[np.float64]) -> NDArray[np.float64]:
    """R [D, rank] with R R^T = `cov`; directions whose variance is rounding noise are left out."""
    variances, directions = np.linalg.eigh(cov)
    kept = variances > len(cov) * np.finfo(np.float64).eps * max(variances[-1], 0.0)
    root: NDArray[np.float64] = directions[:, kept] * np.sqrt(variances[kept])
    return root
