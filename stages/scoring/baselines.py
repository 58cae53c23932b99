"""Pictures that no generator made, scored beside the samples: a number that these reach as well proves nothing.

Images are uint8 [N, H, W, 3] with labels int [N]. A wanted label of -1 asks for no class in particular: its baseline is
made from all images, whatever their labels.
"""

import numpy as np
from numpy.typing import NDArray

from rae.store.errors import ConfigError

_GAUSSIAN = 0x6761  # keeps these draws apart from others of the same seed


def class_means(
    images: NDArray[np.uint8], labels: NDArray[np.integer], wanted_labels: NDArray[np.integer]
) -> NDArray[np.uint8]:
    """The mean picture of each wanted label's class. What a classifier recognises, without any variety.

    Raises ConfigError if no image carries a wanted label.
    """
    out = np.empty((len(wanted_labels), *images.shape[1:]), np.uint8)
    for label in np.unique(wanted_labels):
        mean = _of_class(images, labels, int(label)).mean(axis=0, dtype=np.float64)
        out[wanted_labels == label] = np.rint(mean)
    return out


def pixel_gaussian(
    images: NDArray[np.uint8], labels: NDArray[np.integer], wanted_labels: NDArray[np.integer], seed: int
) -> NDArray[np.uint8]:
    """Draws from one Gaussian per class over all pixels, with the class's mean and full covariance, clipped to uint8.

    Has the variety of the pixels' second moments and nothing beyond. A draw is the mean plus the class's deviations
    from it, weighted by independent normal numbers, divided by sqrt(n - 1): exactly the covariance of its n images,
    at any image size, without forming it. Draw `i` depends on (seed, i, label) alone.

    Raises ConfigError if no image carries a wanted label.
    """
    out = np.empty((len(wanted_labels), *images.shape[1:]), np.uint8)
    for label in np.unique(wanted_labels):
        members = _of_class(images, labels, int(label)).reshape(-1, out[0].size).astype(np.float32)
        mean = members.mean(axis=0)
        members -= mean
        scale = max(len(members) - 1, 1) ** -0.5
        for i in np.flatnonzero(wanted_labels == label):
            weights = np.random.default_rng((seed, _GAUSSIAN, int(i))).standard_normal(len(members), dtype=np.float32)
            pixels = mean + scale * (weights @ members)
            out[i] = np.rint(pixels).clip(0, 255).reshape(out.shape[1:])
    return out


def _of_class(images: NDArray[np.uint8], labels: NDArray[np.integer], label: int) -> NDArray[np.uint8]:
    members = images if label < 0 else images[labels == label]
    if not len(members):
        raise ConfigError(f"Images of class {label} are asked for, and no real training image has this label.")
    return members
