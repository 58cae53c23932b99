"""Rows of a latent store by number: where they lie, and their bytes, read by a few threads into lent memory."""

import resource
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rae.store.buffers import Buffers
from rae.store.compression import decompress
from rae.store.errors import CorruptData
from rae.store.formats import StoredArray
from rae.store.layout import LatentLayout
from rae.store.mirror import Mirror, mirror_at
from rae.store.order import IntArray
from rae.store.parallel import sliced
from rae.store.remote_rows import Nearby
from rae.store.remote_shard import open_remote_shard
from rae.store.stored_part import open_shard
from rae.store.zarr_shard import Shard, check_size


class RowReader:
    """Reads the valid rows of a finished store; threads and forked processes may share it.

    `rows` are the valid rows of each part, `has_holes` whether it has others among them, `sizes` the bytes of its shard
    in each array. A shard is opened when a row of its is first asked for, and held against these.
    """

    def __init__(
        self,
        folder: Path,
        layout: LatentLayout,
        sizes: dict[str, IntArray],
        rows: IntArray,
        has_holes: npt.NDArray[np.bool_],
    ) -> None:
        self._layout, self._has_holes = layout, has_holes
        self.first_row = np.concatenate([[0], np.cumsum(rows)])  # of each part, and one behind the last
        self._buffers = Buffers()
        mirror = mirror_at(folder)
        self._shard = lru_cache(_open_files() // 2)(partial(_open_shard, folder, mirror, layout, sizes, rows))
        self._nearby = Nearby(self._shard, layout.arrays) if mirror is not None else None

    def __len__(self) -> int:
        return int(self.first_row[-1])

    def places(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """The part of each row, and its place among the part's samples."""
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} were asked of a store of {len(self)}")
        parts = np.searchsorted(self.first_row, rows, side="right") - 1
        places = rows - self.first_row[parts]
        # Only parts with invalid rows need their shard's index for that.
        for part in np.unique(parts[self._has_holes[parts]]).tolist():
            here = parts == part
            places[here] = self._shard(part, self._layout.arrays[0]).valid_rows[places[here]]
        return parts, places

    def read(self, rows: IntArray, views: IntArray) -> npt.NDArray[Any]:
        """Raw latents [B, C, H, W] of `rows` [B] in the given `views` [B] (or one for all); float16 or float32."""
        layout, arrays = self._layout, self._layout.arrays
        parts, places = self.places(rows)
        chosen = np.broadcast_to(views, parts.shape)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < layout.views:
            raise IndexError(f"a store of {layout.views} view(s) was asked for views {chosen.min()} to {chosen.max()}")
        if self._nearby is not None:
            self._nearby.bring(zip(parts.tolist(), places.tolist(), chosen.tolist(), strict=True))
        chunks = [self._buffers.take((parts.size, layout.chunk_bytes(array)), np.uint8) for array in arrays]
        stored = [
            chunk.view(array.dtype).reshape(-1, *layout.chunk_shape(array))
            for chunk, array in zip(chunks, arrays, strict=True)
        ]
        decoded = self._buffers.take((parts.size, *layout.latent_shape), np.float32) if layout.is_decoded else None

        def fill(some: range) -> None:
            for one in some:
                for array, chunk in zip(arrays, chunks, strict=True):
                    self._fill(array, int(parts[one]), int(places[one]), int(chosen[one]), chunk[one])
                if decoded is not None:
                    layout.decode(tuple(each[one] for each in stored), decoded[one])

        sliced(fill, parts.size, sum(chunk.nbytes for chunk in chunks))
        return stored[0] if decoded is None else decoded

    def _fill(self, array: StoredArray, part: int, place: int, view: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` with the bytes that one of the arrays holds of a latent, decompressed."""
        shard, compressor = self._shard(part, array), self._layout.compressor
        if compressor == "none":
            shard.read(place, view, out)
            return
        numbers = out.view(array.dtype)
        numbers.fill(array.fill)  # nothing that a damaged chunk leaves out may look like numbers
        try:
            decompress(compressor, shard.chunk(place, view), numbers)
        except ValueError as error:
            raise CorruptData(f"row {place} of {shard.path} cannot be decompressed: {error}") from error

    def announce(self, rows: IntArray, views: IntArray) -> None:
        """Ask the system to read these rows ahead; returns at once."""
        parts, places = self.places(rows)
        if self._nearby is not None:
            self._nearby.begin(zip(parts.tolist(), places.tolist(), views.tolist(), strict=True))
            return
        for part, place, view in zip(parts.tolist(), places.tolist(), views.tolist(), strict=True):
            for array in self._layout.arrays:
                self._shard(part, array).announce(place, view)


def _open_shard(
    folder: Path,
    mirror: Mirror | None,
    layout: LatentLayout,
    sizes: dict[str, IntArray],
    rows: IntArray,
    part: int,
    array: StoredArray,
) -> Shard:
    """A part's shard in one array, of the size and the number of rows that the store lists for it."""
    key, size = layout.shard_key(part, array.name), int(sizes[array.name][part])
    if mirror is not None and not (folder / key).exists():
        shard: Shard = open_remote_shard(mirror, layout, part, array, size)
    else:
        check_size(folder / key, size)
        shard = open_shard(folder, layout, part, array)
    if shard.valid_rows.size != rows[part]:
        raise CorruptData(f"{shard.path} holds {shard.valid_rows.size} rows and is listed with {rows[part]}")
    return shard


def _open_files() -> int:
    """How many files a process may have open: each shard holds one.

    The usual limit of 1,024 is a courtesy to programs that call select(); as far as the system lets us it is raised.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if most == resource.RLIM_INFINITY else min(most, 65_536)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
            limit = wanted
    return 65_536 if limit == resource.RLIM_INFINITY else max(16, min(limit, 65_536))
