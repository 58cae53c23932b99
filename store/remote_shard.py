"""Shards of latents that lie in a bucket: their index and their latents are read by range, and kept in the cache."""

import hashlib
from collections.abc import Sequence
from threading import Lock

import numpy as np
import numpy.typing as npt

from rae.store.errors import CorruptData
from rae.store.formats import StoredArray
from rae.store.layout import LatentLayout
from rae.store.mirror import Mirror
from rae.store.range_cache import RangeFile, range_folder, shared_budget
from rae.store.zarr_shard import Shard, index_size

Chunk = tuple[int, int]  # row of the shard, view


class RemoteShard(Shard):
    """A shard below `mirror.key`, of `size` bytes, read where it lies. As `Shard` but for `fetch`."""

    def __init__(self, mirror: Mirror, key: str, size: int, rows: int, views: int, chunk_bytes: int | None) -> None:
        self.path = mirror.folder / key
        self._objects, self._key = mirror.objects, f"{mirror.key}/{key}"
        self._views = views
        footer_bytes = index_size(rows, views)
        if size < footer_bytes:
            raise CorruptData(f"{self._where} is truncated: {size} bytes, and its index alone takes {footer_bytes}")
        self._ranges = _range_file(mirror, key, size, rows * views + 1)
        self._held: dict[Chunk, npt.NDArray[np.uint8]] = {}
        self._lock = Lock()
        self._file = self._ranges.handle
        footer = np.empty(footer_bytes, np.uint8)
        index_chunk, start = rows * views, size - footer_bytes
        if self._ranges.has(index_chunk):
            super()._read(start, footer)
        else:
            (data,) = self._objects.read_ranges(self._key, [start], [footer_bytes])
            footer[:] = np.frombuffer(data, np.uint8)
        self._set_index(footer, rows, views, start, chunk_bytes)
        if not self._ranges.has(index_chunk):
            self._ranges.keep(index_chunk, start, footer.data)

    @property
    def _where(self) -> str:
        return f"{self._objects.place}/{self._key}"

    def is_near(self, row: int, view: int) -> bool:
        """Whether a latent can be read without asking the bucket."""
        return (row, view) in self._held or self._ranges.has(row * self._views + view)

    def fetch(self, chunks: Sequence[Chunk]) -> None:
        """Bring latents near, neighbours in one request. What the cache has no room for is held until it is read."""
        starts = [self._offset(row, view) for row, view in chunks]
        sizes = [int(self._sizes[row, view]) for row, view in chunks]
        found = self._objects.read_ranges(self._key, starts, sizes)
        for (row, view), start, size, data in zip(chunks, starts, sizes, found, strict=True):
            if len(data) != size:
                raise CorruptData(f"{self._where} was cut short")
            if not self._ranges.keep(row * self._views + view, start, data):
                with self._lock:
                    self._held[row, view] = np.frombuffer(data, np.uint8)

    def chunk(self, row: int, view: int) -> npt.NDArray[np.uint8]:
        data = np.empty(int(self._sizes[row, view]), np.uint8)
        self.read(row, view, data)
        return data

    def read(self, row: int, view: int, out: npt.NDArray[np.uint8]) -> None:
        while not self._ranges.has(row * self._views + view):
            with self._lock:
                held = self._held.pop((row, view), None)
            if held is not None:
                out[:] = held
                return
            self.fetch([(row, view)])
        super()._read(self._offset(row, view), out)

    def announce(self, row: int, view: int) -> None:
        if self._ranges.has(row * self._views + view):
            super().announce(row, view)


def open_remote_shard(mirror: Mirror, layout: LatentLayout, number: int, array: StoredArray, size: int) -> RemoteShard:
    """A part's shard, of `size` bytes, in one of the arrays; `MissingInput` or `CorruptData` names the object."""
    chunk_bytes = layout.chunk_bytes(array) if layout.compressor == "none" else None
    key = layout.shard_key(number, array.name)
    return RemoteShard(mirror, key, size, layout.rows_per_part, layout.views, chunk_bytes)


def _range_file(mirror: Mirror, key: str, size: int, chunks: int) -> RangeFile:
    place = hashlib.sha256(f"{mirror.objects.place}/{mirror.key}".encode()).hexdigest()[:16]
    return RangeFile(range_folder() / place / key.replace("/", "."), size, chunks, shared_budget(range_folder()))
