"""Exact mean and variance of latents, the same bits for the same stored values, whoever computed them.

Each part is summed in row order in float64, shifted by its first latent so that nothing cancels; parts are merged in
part order (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
1979). Only IEEE additions and multiplications of whole arrays occur, in a fixed order, so neither the machine nor the
order in which parts were made shows in the result.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from rae.store.errors import CorruptData, MissingInput

Float64Array = npt.NDArray[np.float64]

EPSILON = 1e-5  # under the root of the variance when latents are whitened; the official code's value


@dataclass(frozen=True)
class Moments:
    """Number of latents, their mean [C, H, W] and sum of squared deviations from it [C, H, W], in float64."""

    count: int
    mean: Float64Array
    m2: Float64Array

    def merge(self, later: "Moments") -> "Moments":
        """Moments of both sets of latents, this one's first."""
        if later.count == 0:
            return self
        if self.count == 0:
            return later
        count = self.count + later.count
        delta = later.mean - self.mean
        mean = self.mean + delta * (later.count / count)
        m2 = self.m2 + later.m2 + delta * delta * (self.count * later.count / count)
        return Moments(count, mean, m2)

    def identical(self, other: "Moments") -> bool:
        """Whether both are the same to the last bit."""
        return self.to_bytes() == other.to_bytes()

    def to_bytes(self) -> bytes:
        """An npz file; the same bytes for the same moments."""
        return _npz(count=np.int64(self.count), mean=self.mean, m2=self.m2)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `to_bytes` wrote; `MissingInput` or `CorruptData` names the file."""
        arrays = _load_npz(path, {"count", "mean", "m2"})
        return cls(int(arrays["count"]), arrays["mean"], arrays["m2"])


class RunningStats:
    """Moments of latents [C, H, W] that arrive one by one; three float64 buffers, whatever their number."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._count = 0
        self._shift = np.zeros(shape)
        self._sum = np.zeros(shape)
        self._squares = np.zeros(shape)
        self._deviation = np.empty(shape)

    def add(self, latent: npt.NDArray[Any]) -> None:
        """Take one latent, in the values that are stored. Not finite values must be kept out by the caller."""
        if self._count == 0:
            self._shift[...] = latent
        np.subtract(latent, self._shift, out=self._deviation)
        np.add(self._sum, self._deviation, out=self._sum)
        np.multiply(self._deviation, self._deviation, out=self._deviation)
        np.add(self._squares, self._deviation, out=self._squares)
        self._count += 1

    def moments(self) -> Moments:
        """What was added so far."""
        if self._count == 0:
            return Moments(0, self._sum.copy(), self._squares.copy())
        shifted_mean = self._sum / self._count
        m2 = np.maximum(self._squares - self._sum * shifted_mean, 0.0)
        return Moments(self._count, self._shift + shifted_mean, m2)


def merge(parts: Iterable[Moments]) -> Moments | None:
    """Moments of all parts, merged in the order given; None if there is none."""
    total: Moments | None = None
    for moments in parts:
        total = moments if total is None else total.merge(moments)
    return total


@dataclass(frozen=True)
class LatentStats:
    """What latents are whitened with: mean and population variance [C, H, W] in float64 over `count` latents.

    Every stored view counts as a latent.
    """

    count: int
    mean: Float64Array
    variance: Float64Array

    @classmethod
    def of(cls, moments: Moments) -> Self:
        return cls(moments.count, moments.mean, moments.m2 / moments.count)

    def whiten(self, latents: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """(z - mean) / sqrt(variance + 1e-5) in float32, for latents [..., C, H, W]."""
        mean, deviation = self._float32
        whitened = latents.astype(np.float32)
        whitened -= mean
        whitened /= deviation
        return whitened

    @cached_property
    def _float32(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        return self.mean.astype(np.float32), np.sqrt(self.variance + EPSILON).astype(np.float32)

    def identical(self, other: "LatentStats") -> bool:
        """Whether both are the same to the last bit."""
        return self.to_bytes() == other.to_bytes()

    def to_bytes(self) -> bytes:
        """`stats.npz`: mean, variance, count; the same bytes for the same statistics."""
        return _npz(mean=self.mean, variance=self.variance, count=np.int64(self.count))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `to_bytes` wrote; `MissingInput` or `CorruptData` names the file."""
        arrays = _load_npz(path, {"mean", "variance", "count"})
        return cls(int(arrays["count"]), arrays["mean"], arrays["variance"])


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _load_npz(path: Path, names: set[str]) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if set(file.files) != names:
                raise CorruptData(f"{path} holds {sorted(file.files)}, not {sorted(names)}")
            return {name: file[name] for name in names}
    except FileNotFoundError as error:
        raise MissingInput(f"the statistics {path} are missing") from error
    except (ValueError, EOFError, OSError, BadZipFile) as error:
        raise CorruptData(f"the statistics {path} cannot be read ({error})") from error
