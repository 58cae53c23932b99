"""Images to be scored, wherever they lie, read by their index: samples, folders and shards, an npz, an array.

A set is uint8 RGB of one size and is read a range of rows at a time, so that memory does not grow with it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rae.stages.images import BadImage, center_crop, decode, mode_of
from rae.store.errors import CorruptData, StaleInput
from rae.store.manifest import canonical
from rae.store.samples import batch_paths, read_batch, read_labels
from rae.store.source import REASONS, Source

_BLOCK = 64  # images in memory at a time
_MODES = {"L": "grayscale", "LA": "grayscale with transparency", "RGBA": "RGB with transparency", "P": "palette colour"}


class ImageSet(Protocol):
    """Images addressed by row; `labels` int64 [N], -1 for none. `digest` says which images these are."""

    @property
    def labels(self) -> NDArray[np.integer]: ...
    @property
    def digest(self) -> str: ...

    def read(self, rows: Sequence[int] | range) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Images uint8 [len(rows), H, W, 3], and which of them can be used [len(rows)]; the others are black."""
        ...


class ArrayImages:
    """Images that are in memory already."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.integer] | None = None) -> None:
        check_images(images, "these images")
        self._images = images
        self.labels: NDArray[np.integer] = np.full(len(images), -1) if labels is None else labels
        self.digest = hashlib.sha256(images.tobytes() + self.labels.astype("<i8").tobytes()).hexdigest()

    def read(self, rows: Sequence[int] | range) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """See `ImageSet`."""
        return self._images[list(rows)], np.ones(len(rows), np.bool_)


class NpyImages:
    """Images in an .npy file of our own making; `describe` is what its digest is taken over."""

    def __init__(self, path: Path, labels: NDArray[np.integer], describe: str) -> None:
        self._path, self.labels = path, labels
        self.digest = hashlib.sha256(describe.encode()).hexdigest()

    def read(self, rows: Sequence[int] | range) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """See `ImageSet`; mapped anew each time, since what stays mapped counts as memory."""
        return np.load(self._path, mmap_mode="r")[list(rows)], np.ones(len(rows), np.bool_)


class SampleImages:
    """The images of a samples artifact, from its payload folder; `digest` is its content."""

    def __init__(self, payload: Path, digest: str) -> None:
        self._paths = batch_paths(payload)
        labels = [read_labels(path) for path in self._paths]
        self._firsts = np.cumsum([0, *map(len, labels)])
        self._open: tuple[int, NDArray[np.uint8]] = (-1, np.empty((0, 0, 0, 3), np.uint8))
        self.labels: NDArray[np.integer] = np.concatenate(labels)
        self.digest = digest

    def read(self, rows: Sequence[int] | range) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """See `ImageSet`; a batch of the artifact is in memory at a time. Raises CorruptData, StaleInput."""
        images = [self._image(row) for row in rows]
        return _stacked(images, [f"image {row}" for row in rows]), np.ones(len(rows), np.bool_)

    def _image(self, row: int) -> NDArray[np.uint8]:
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        if self._open[0] != number:
            self._open = number, read_batch(self._paths[number]).images
        image: NDArray[np.uint8] = self._open[1][row - self._firsts[number]]
        return image


class SourceImages:
    """Images of shards or of a folder. With `size`, the centre crop of that side, and what cannot be decoded is unused.

    Without, images are taken as they are, all of one size and RGB: what generated images must be. There, one that
    cannot be used is an error, and one without a label has -1. `labels` [N] stand in for the source's own.
    """

    def __init__(self, source: Source, size: int | None = None, labels: NDArray[np.integer] | None = None) -> None:
        self._source, self._size = source, size
        usable = source.reasons == 0
        if size is None:
            usable |= source.reasons == REASONS.index("missing label")
            if not usable.all():
                row = int(np.argmin(usable))
                raise CorruptData(f"`{source.keys[row]}` can't be scored: {source.reason(row)}")
        self._rows = np.flatnonzero(usable)
        if not len(self._rows):
            raise CorruptData(f"none of the {len(source)} images can be used")
        self.labels: NDArray[np.integer] = (source.labels if labels is None else labels)[self._rows]
        self.digest = hashlib.sha256(canonical([size, source.digests])).hexdigest()
        self._first: NDArray[np.uint8] | None = None

    def read(self, rows: Sequence[int] | range) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """See `ImageSet`. Raises CorruptData or StaleInput for an image that is not what it must be."""
        images = [self._image(int(self._rows[row])) for row in rows]
        usable = np.array([image is not None for image in images], np.bool_)
        if self._size is not None:
            black = np.zeros((self._size, self._size, 3), np.uint8)
            return np.stack([black if image is None else image for image in images]), usable
        if self._first is None:
            self._first = self._image(int(self._rows[0]))
        names = [f"`{self._source.keys[int(self._rows[row])]}`" for row in rows]
        return _stacked([self._first, *images], [f"`{self._source.keys[int(self._rows[0])]}`", *names])[1:], usable

    def _image(self, row: int) -> NDArray[np.uint8] | None:
        data = self._source.read(row)
        try:
            if self._size is not None:
                return center_crop(decode(data), self._size)
            return plain_rgb(data, f"`{self._source.keys[row]}`")
        except BadImage as error:
            if self._size is not None:
                return None
            raise CorruptData(f"`{self._source.keys[row]}` gives no image: {error.reason}") from error


class Rows:
    """Some rows of another set, in this order."""

    def __init__(self, images: ImageSet, rows: NDArray[np.integer]) -> None:
        self._images, self._rows = images, rows
        self.labels: NDArray[np.integer] = images.labels[rows]
        chosen = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        self.digest = hashlib.sha256(canonical([images.digest, chosen])).hexdigest()

    def read(self, rows: Sequence[int] | range) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """See `ImageSet`."""
        return self._images.read([int(self._rows[row]) for row in rows])


def usable_blocks(
    images: ImageSet, rows: NDArray[np.integer] | None = None
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.integer]]]:
    """The usable images of `rows`, or of all, with their labels, `_BLOCK` or fewer at a time."""
    rows = np.arange(len(images.labels)) if rows is None else rows
    for first in range(0, len(rows), _BLOCK):
        block = rows[first : first + _BLOCK]
        pixels, usable = images.read(block.tolist())
        yield pixels[usable], images.labels[block[usable]]


def check_images(images: NDArray[np.generic], where: str) -> None:
    """Raises StaleInput, naming `where`, for what is not uint8 [N, H, W, 3]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise StaleInput(f"{where}: images are uint8 [N, H, W, 3], and these are {images.dtype} {images.shape}")


def check_size(images: ImageSet, size: int, what: str) -> None:
    """Raises StaleInput unless the first image is `size` squared, as `what` is to be."""
    height, width = images.read(range(1))[0].shape[1:3]
    if (height, width) != (size, size):
        raise StaleInput(f"these images have {width} x {height} pixels, and {what} to be of {size}")


def plain_rgb(data: bytes, name: str) -> NDArray[np.uint8]:
    """The pixels of a file that holds 8-bit RGB, unconverted: uint8 [H, W, 3].

    A generated image of another kind would have to be converted, and each way of doing so gives another score. Raises
    StaleInput for grey, transparent or palette images, BadImage as `decode` does.
    """
    mode = mode_of(data)
    if mode != "RGB":
        raise StaleInput(f"{name} is {_MODES.get(mode, mode)}, and images to be scored are 8-bit RGB: convert it first")
    return np.asarray(decode(data))


def _stacked(images: Sequence[NDArray[np.uint8] | None], names: Sequence[str]) -> NDArray[np.uint8]:
    """Images of one size as one array; StaleInput names two that differ."""
    found = [image for image in images if image is not None]
    for image, name in zip(found, names, strict=True):
        if image.shape != found[0].shape:
            sizes = ["{1} x {0}".format(*one.shape) for one in (found[0], image)]
            raise StaleInput(
                f"images of one set have one size: {names[0]} has {sizes[0]} pixels, and {name} has {sizes[1]}"
            )
    return np.stack(found)
