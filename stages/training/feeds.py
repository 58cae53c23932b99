"""What the decoder learns from: images by row, with their tokens where those are stored.

`online` shows random crops, whose tokens the encoder is to make (RAE paper, section 3). `cached` shows the images as
they were encoded, beside the stored tokens of the same view; `crops` does so where the views are crops, cut again at
their recorded boxes.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rae.stages.images import BadImage, center_crop, cut, decode, resize_shorter, resized_crop
from rae.store.crops import open_boxes
from rae.store.errors import CorruptData
from rae.store.latents import LatentStore
from rae.store.latents_images import StoredImages
from rae.store.order import IntArray, draw
from rae.store.source import Source

Pixels = npt.NDArray[np.uint8]


class Feed(Protocol):
    """Rows to learn from. Safe to use from several threads."""

    def __len__(self) -> int: ...

    def batch(self, rows: IntArray, epoch: int) -> tuple[Pixels, npt.NDArray[Any] | None]:
        """Pixels [B, S, S, 3] of an epoch's rows, and their raw tokens [B, C, H, W] if they are stored."""

    def keys_of(self, rows: IntArray) -> Sequence[str]:
        """Names of the rows, for messages."""


class OnlineFeed:
    """Images decoded, resized to `resize_size` and cropped as (seed, epoch, row) says; without it, centre crops."""

    def __init__(self, source: Source, image_size: int, resize_size: int | None, seed: int) -> None:
        self._source, self._size, self._resize_size, self._seed = source, image_size, resize_size, seed

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, rows: IntArray, epoch: int) -> tuple[Pixels, None]:
        """As of every feed, without tokens. A row that cannot be used shows the next usable one: it never trains."""
        across, down = (draw(self._seed, f"crop_{axis}", epoch, rows) for axis in "xy")
        crops = [self._crop(int(row), (x, y)) for row, x, y in zip(rows, across, down, strict=True)]
        return np.stack(crops), None

    def keys_of(self, rows: IntArray) -> Sequence[str]:
        """The keys of the source."""
        return [self._source.keys[row] for row in rows]

    def _crop(self, row: int, position: tuple[float, float]) -> Pixels:
        for candidate in range(row, row + len(self._source)):
            usable = candidate % len(self._source)
            if self._source.reason(usable) is not None:
                continue
            try:
                image = decode(self._source.read(usable))
                if self._resize_size is None:
                    return center_crop(image, self._size)
                return resized_crop(image, self._resize_size, self._size, position)
            except BadImage:
                continue
        raise CorruptData("none of the training images can be decoded")


class StoredFeed:
    """The valid rows of a latent store, each in a view drawn from (seed, "view", epoch, row), with its image.

    `image_size`, and of crops `resize_size`, are those that were encoded with. Raises `StaleInput` if `source` holds
    other images.
    """

    def __init__(
        self, source: Source, store: LatentStore, image_size: int, seed: int, resize_size: int | None = None
    ) -> None:
        self._images, self._store, self._size, self._seed = StoredImages(store, source), store, image_size, seed
        self._resize_size = resize_size
        self._boxes = open_boxes(store.folder, store.layout, store.slots) if resize_size is not None else None

    def __len__(self) -> int:
        return len(self._store)

    def batch(self, rows: IntArray, epoch: int) -> tuple[Pixels, npt.NDArray[Any]]:
        """As of every feed. Raises `StaleInput`, naming it, for an image that is not the one that was encoded."""
        views = self._store.draw_views(rows, self._seed, epoch)
        pixels = [self._view(int(row), int(view)) for row, view in zip(rows, views, strict=True)]
        return np.stack(pixels), self._store.rows(rows, views)

    def keys_of(self, rows: IntArray) -> Sequence[str]:
        """The keys of the store."""
        return self._store.keys_of(rows)

    def _view(self, row: int, view: int) -> Pixels:
        """The image whose tokens are the row's in this view."""
        image = decode(self._images.read(row))
        if self._boxes is None or self._resize_size is None:
            centre = center_crop(image, self._size)
            return centre[:, ::-1] if view else centre
        left, top, _, _ = self._boxes[self._store.slot_of(row), view].tolist()
        return cut(resize_shorter(image, self._resize_size), left, top, self._size)
