"""How close reconstructions are to originals: PSNR, SSIM, perceptual and Fréchet distance.

Images are uint8 [N, H, W, 3].
"""

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from rae.stages.models.pixels import to_unit
from rae.stages.scoring.extractors import BLOCK_SIZE, Extractor
from rae.stages.scoring.frechet import Moments, frechet_distance
from rae.store.errors import ConfigError, StaleInput

MAX_PSNR_DB = 100.0
"""What identical images count as. One grey level off in one channel of one pixel of 256x256 is 101 dB."""

_SSIM_BORDER = 5  # pixels: half of the Gaussian window of 11 x 11, sigma 1.5, of Wang et al. 2004
_BLOCK = 8  # images at a time: SSIM takes 270 MB for 8 of 256 x 256


class ReconstructionScores:
    """Means over images that come batch by batch.

    `distance` is a perceptual one: float [B, 3, S, S] in [0, 1], twice -> [B]; None takes none.
    """

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor] | None, device: str) -> None:
        self._distance, self._device = distance, device
        self._sums: Counter[str] = Counter()
        self._count = 0

    def add(self, reference: NDArray[np.uint8], reconstruction: NDArray[np.uint8]) -> None:
        """Take in a batch; raises as `psnr_db` and `ssim` do."""
        scores = {"psnr_db": psnr_db(reference, reconstruction), "ssim": ssim(reference, reconstruction)}
        if self._distance is not None:
            made, real = (to_unit(images, self._device) for images in (reconstruction, reference))
            scores["perceptual_distance"] = float(self._distance(made, real).double().mean())
        self._sums.update({name: value * len(reference) for name, value in scores.items()})
        self._count += len(reference)

    def means(self) -> dict[str, float]:
        """`psnr_db`, `ssim` and, where there is a distance, `perceptual_distance`."""
        return {name: value / self._count for name, value in self._sums.items()}


class ReconstructionDistance:
    """The Fréchet distance of reconstructions, with Inception rFID, to their originals or to `against`.

    Images come batch by batch; features are taken in the extractor's own blocks, whatever the batches.
    """

    def __init__(self, extractor: Extractor, against: Moments | None) -> None:
        self._against = against
        self._made, self._originals = _BlockMoments(extractor), _BlockMoments(extractor)

    def add(self, originals: NDArray[np.uint8], reconstructions: NDArray[np.uint8]) -> None:
        """Take in a batch."""
        self._made.add(reconstructions)
        if self._against is None:
            self._originals.add(originals)

    def value(self) -> float:
        """The distance of all that came. Raises as `frechet_distance` does."""
        against = self._originals.finished() if self._against is None else self._against
        return frechet_distance(against, self._made.finished())


class _BlockMoments:
    """Moments of features of images that wait until they fill a block."""

    def __init__(self, extractor: Extractor) -> None:
        self._extractor, self._moments = extractor, Moments(extractor.dim)
        self._waiting: list[NDArray[np.uint8]] = []

    def add(self, images: NDArray[np.uint8]) -> None:
        self._waiting.extend(images)
        while len(self._waiting) >= BLOCK_SIZE:
            self._take(BLOCK_SIZE)

    def finished(self) -> Moments:
        if self._waiting:
            self._take(len(self._waiting))
        return self._moments

    def _take(self, count: int) -> None:
        self._moments.update(self._extractor.block(np.stack(self._waiting[:count])))
        del self._waiting[:count]


def psnr_db(reference: NDArray[np.uint8], reconstruction: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB, the mean over the images of each image's own; at most `MAX_PSNR_DB` each.

    The data range is 1.0 with pixels in [0, 1]. Raises StaleInput if the two sets differ in shape, ConfigError if
    they are empty.
    """
    errors = [np.square(a - b).mean(axis=(1, 2, 3)) for a, b in _pairs(reference, reconstruction)]
    smallest = 10 ** (-MAX_PSNR_DB / 10)
    return float((-10 * np.log10(np.maximum(np.concatenate(errors), smallest))).mean())


def ssim(reference: NDArray[np.uint8], reconstruction: NDArray[np.uint8]) -> float:
    """Structural similarity in [-1, 1], the mean over the images (Wang et al. 2004), data range 1.0, on RGB.

    Computed by torchmetrics, images mirrored at their borders, in float32: within 1e-5 of float64, whose convolutions
    take ten times the time and memory. Raises StaleInput if the two sets differ in shape, ConfigError if they are
    empty or too small to be mirrored.
    """
    if min(reference.shape[1:3]) <= _SSIM_BORDER:
        size = f"{reference.shape[1]}x{reference.shape[2]}"
        raise ConfigError(f"SSIM needs images of more than {_SSIM_BORDER} pixels a side, and these have {size}.")
    values = []
    for a, b in _pairs(reference, reconstruction):
        target, preds = (torch.from_numpy(pixels).float().permute(0, 3, 1, 2) for pixels in (a, b))
        value = structural_similarity_index_measure(preds, target, sigma=1.5, data_range=1.0, reduction="none")
        assert isinstance(value, torch.Tensor)  # a pair only where contrast is asked for too
        values.append(value)
    return float(torch.cat(values).mean(dtype=torch.float64))


def _pairs(
    reference: NDArray[np.uint8], reconstruction: NDArray[np.uint8]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Blocks of both sets as float64 in [0, 1]."""
    if reference.shape != reconstruction.shape:
        raise StaleInput(
            f"Reconstructions of shape {reconstruction.shape} cannot be compared with originals of {reference.shape}."
        )
    if not len(reference):
        raise ConfigError("There is no image to compare.")
    for start in range(0, len(reference), _BLOCK):
        block = slice(start, start + _BLOCK)
        yield reference[block] / 255.0, reconstruction[block] / 255.0
