"""Features as metrics read them: a chunk after another, or some rows, whether they lie on a disk or in memory."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rae.store.errors import CorruptData

CHUNK_ROWS = 1024
"""Images whose features are in memory at a time, and in a file: 8 MB of Inception's."""


class FeatureRows(Protocol):
    """Features float32 [N, D] of images in the order of their index, wherever they lie."""

    @property
    def dim(self) -> int: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[NDArray[np.float32]]: ...
    def take(self, rows: NDArray[np.integer]) -> NDArray[np.float32]: ...


class InMemory:
    """Features that are an array [N, D]."""

    def __init__(self, features: NDArray[Any]) -> None:
        self._features, self.dim = features, features.shape[1]

    def __len__(self) -> int:
        return len(self._features)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for first in range(0, len(self), CHUNK_ROWS):
            yield self._features[first : first + CHUNK_ROWS]

    def take(self, rows: NDArray[np.integer]) -> NDArray[Any]:
        """Those of `rows`: [len(rows), D]."""
        taken: NDArray[Any] = self._features[rows]
        return taken


class Gathered:
    """Some rows of other features, in this order, repeated or not."""

    def __init__(self, features: FeatureRows, rows: NDArray[np.integer]) -> None:
        self._features, self._rows = features, rows
        self.dim = features.dim

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for first in range(0, len(self), CHUNK_ROWS):
            yield self._features.take(self._rows[first : first + CHUNK_ROWS])

    def take(self, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """Those of `rows`: [len(rows), D]."""
        return self._features.take(self._rows[rows])


def as_rows(features: FeatureRows | NDArray[Any]) -> FeatureRows:
    """Features, or an array of them, as `FeatureRows`."""
    return InMemory(features) if isinstance(features, np.ndarray) else features


def check_finite(features: FeatureRows) -> None:
    """Raises CorruptData, with the place of the first image whose features are not finite."""
    first = 0
    for chunk in features:
        finite = np.isfinite(chunk).all(axis=1)
        if not finite.all():
            bad = first + int(np.argmin(finite))
            raise CorruptData(f"The features of image {bad} are not finite (counted from 0).")
        first += len(chunk)
