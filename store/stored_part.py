"""One part as it lies on the disk: its shard in every array of the store, read row by row."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rae.store.compression import decompress
from rae.store.errors import CorruptData
from rae.store.formats import StoredArray
from rae.store.layout import LatentLayout
from rae.store.zarr_shard import Shard, crc32c


def open_shard(folder: Path, layout: LatentLayout, number: int, array: StoredArray) -> Shard:
    """A part's shard in one of the arrays; `MissingInput` or `CorruptData` names the file."""
    chunk_bytes = layout.chunk_bytes(array) if layout.compressor == "none" else None
    return Shard(folder / layout.shard_key(number, array.name), layout.rows_per_part, layout.views, chunk_bytes)


class StoredPart:
    """The latents of part `number` of the store in `folder`, whose metadata need not be there yet.

    `MissingInput` or `CorruptData` names a file that is not there or is no shard of this layout.
    """

    def __init__(self, folder: Path, layout: LatentLayout, number: int) -> None:
        self._layout = layout
        self._shards = [open_shard(folder, layout, number, array) for array in layout.arrays]
        if any(shard.valid_rows.tolist() != self.valid_rows.tolist() for shard in self._shards):
            raise CorruptData(f"{self._shards[-1].path} holds other rows than {self._shards[0].path}")

    @property
    def valid_rows(self) -> npt.NDArray[np.intp]:
        """Rows of the part, ascending, whose latents are there."""
        return self._shards[0].valid_rows

    def row(self, row: int) -> tuple[npt.NDArray[Any], ...]:
        """What is stored of all views of a row, per array [V, ...], decompressed; `CorruptData` names a bad file."""
        stored = []
        for array, shard in zip(self._layout.arrays, self._shards, strict=True):
            shape = (self._layout.views, *self._layout.chunk_shape(array))
            values = np.full(shape, array.fill, array.dtype)
            for view in range(self._layout.views):
                try:
                    decompress(self._layout.compressor, shard.chunk(row, view), values[view].reshape(-1))
                except ValueError as error:
                    raise CorruptData(f"row {row} of {shard.path} cannot be decompressed: {error}") from error
            stored.append(values)
        return tuple(stored)


def checksums(stored: tuple[npt.NDArray[Any], ...]) -> list[int]:
    """The crc32c of each view of a row [V, ...] in all arrays, before compression."""
    return [crc32c(*views) for views in zip(*stored, strict=True)]
