"""Pictures that no generator made, scored beside the samples: a number that these reach as well proves nothing.

A wanted label of -1 asks for no class in particular: its baseline is made from all images, whatever their labels.
Memory holds the images of one class, `MOST_MEMBERS` at most.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rae.stages.scoring.image_sets import ArrayImages, ImageSet, NpyImages, usable_blocks
from rae.store.errors import ConfigError

MOST_MEMBERS = 1024
"""Images that a class's mean and covariance are taken over; of more, so many at equal distances in the set."""

_GAUSSIAN = 0x6761  # keeps these draws apart from others of the same seed


@dataclass(frozen=True)
class Baselines:
    """`means` holds the mean picture of each class once, `mean_of` [N] says which one stands for each wanted label."""

    means: ArrayImages
    mean_of: NDArray[np.intp]
    gaussian: NpyImages


def make_baselines(images: ImageSet, wanted_labels: NDArray[np.integer], seed: int, path: Path) -> Baselines:
    """The two baselines for each wanted label [N], from a set of real images.

    The means are what a classifier recognises, without any variety. The Gaussian draws, which are written to `path`
    (.npy), have the variety of the pixels' second moments within their class and nothing beyond. Raises ConfigError if
    no image carries a wanted label.
    """
    classes, mean_of = np.unique(wanted_labels, return_inverse=True)
    means = []
    for label in classes:
        members = _members(images, int(label))
        means.append(class_mean(members))
        if len(means) == 1:
            shape = (len(wanted_labels), *members.shape[1:])
            np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
        indices = np.flatnonzero(wanted_labels == label)
        out = np.load(path, mmap_mode="r+")  # opened for each class anew: what is mapped counts as memory
        gaussian_draws(members, indices, seed, out)
        del out
    digest = f"pixel_gaussian of {images.digest} with seed {seed} and labels {_text(wanted_labels)}"
    return Baselines(ArrayImages(np.stack(means), classes), mean_of, NpyImages(path, wanted_labels, digest))


def class_mean(members: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mean [H, W, 3] of images [N, H, W, 3]."""
    mean: NDArray[np.uint8] = np.rint(members.mean(axis=0, dtype=np.float64)).astype(np.uint8)
    return mean


def gaussian_draws(members: NDArray[np.uint8], indices: NDArray[np.integer], seed: int, out: NDArray[np.uint8]) -> None:
    """Into the rows `indices` of `out`: draws from the Gaussian over pixels that has the images' mean and covariance.

    A draw is the mean plus the images' deviations from it, weighted by independent normal numbers, divided by
    sqrt(n - 1): exactly their covariance, at any image size, without forming it; clipped to uint8. Draw `i` depends on
    (seed, i) and the images alone.
    """
    pixels = members.reshape(len(members), -1).astype(np.float32)
    mean = pixels.mean(axis=0)
    pixels -= mean
    scale = max(len(members) - 1, 1) ** -0.5
    for i in indices:
        weights = np.random.default_rng((seed, _GAUSSIAN, int(i))).standard_normal(len(members), dtype=np.float32)
        out[i] = np.rint(mean + scale * (weights @ pixels)).clip(0, 255).reshape(members.shape[1:])


def _members(images: ImageSet, label: int) -> NDArray[np.uint8]:
    rows = np.arange(len(images.labels)) if label < 0 else np.flatnonzero(images.labels == label)
    if len(rows) > MOST_MEMBERS:
        rows = rows[np.linspace(0, len(rows) - 1, MOST_MEMBERS).astype(int)]
    blocks = [pixels for pixels, _ in usable_blocks(images, rows)]
    if not sum(map(len, blocks)):
        raise ConfigError(f"Images of class {label} are asked for, and no real training image has this label.")
    return np.concatenate(blocks)


def _text(labels: NDArray[np.integer]) -> str:
    return ",".join(map(str, labels.tolist()))
