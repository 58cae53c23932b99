"""One file of a Zarr v3 sharded array, written as a stream and read by address.

The codec is `sharding_indexed` with its index at the end (Zarr v3 core specification, "sharding codec" 1.0): inner
chunks, then a table of little-endian (offset, bytes) per chunk in which 2^64 - 1 stands for a chunk that is not there,
then the crc32c of that table. Inner chunks here are one latent each, one after another from offset 0: uncompressed and
of a multiple of 4096 bytes, each lies on a page boundary.
"""

import hashlib
import os
import weakref
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt

from rae.store.errors import CorruptData, MissingInput

ABSENT = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_CRC_BYTES = 4
_HASH_BLOCK = 1 << 22


def crc32c(*arrays: npt.NDArray[Any]) -> int:
    """The crc32c of the bytes of C-contiguous arrays, one after another."""
    checksum = 0
    for array in arrays:
        checksum = google_crc32c.extend(checksum, array.reshape(-1).view(np.uint8))
    return int(checksum)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_size(path: Path, size: int) -> None:
    """Raise `MissingInput` or `CorruptData` unless the shard file `path` has `size` bytes."""
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise MissingInput(f"the shard {path} is missing") from error
    if found < size:
        raise CorruptData(f"the shard {path} is truncated: {found} of {size} bytes")
    if found > size:
        raise CorruptData(f"the shard {path} has {found} bytes and was recorded with {size}")


def index_size(rows: int, views: int) -> int:
    """Bytes of the table behind a shard's chunks, with its checksum."""
    return rows * views * 16 + _CRC_BYTES


class ShardWriter:
    """Streams the inner chunks of one shard into `file`; memory does not grow with the shard."""

    def __init__(self, file: BinaryIO, chunks: int) -> None:
        self._file = file
        self._index = np.full((chunks, 2), ABSENT, dtype="<u8")
        self._sha256 = hashlib.sha256()
        self.bytes_written = 0

    def append(self, chunk: int, data: npt.NDArray[np.uint8]) -> None:
        """Write the bytes of inner chunk number `chunk` (C order over the shard's chunks)."""
        self._index[chunk] = (self.bytes_written, data.nbytes)
        self._write(data)

    def finish(self) -> str:
        """Write the index behind the chunks, flush to the disk and close; returns the sha256 of the whole file."""
        footer = np.frombuffer(self._index.tobytes() + crc32c(self._index).to_bytes(_CRC_BYTES, "little"), np.uint8)
        self._write(footer)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()

    def _write(self, data: npt.NDArray[np.uint8]) -> None:
        self._file.write(data.data)
        self._sha256.update(data.data)
        self.bytes_written += data.nbytes


class Shard:
    """A shard file open for reading, and its index, checked once. Threads may share it.

    It is read by address rather than mapped: a file that is cut short under its reader makes an error, not a signal.

    Raises `MissingInput` where there is no file and `CorruptData`, naming the file, where it is not a whole shard of
    `rows` x `views` chunks of `chunk_bytes` bytes each; of any size if None, which is what compressed chunks are.
    """

    def __init__(self, path: Path, rows: int, views: int, chunk_bytes: int | None) -> None:
        self.path = path
        index_bytes = index_size(rows, views)
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise MissingInput(f"the shard {path} is missing") from error
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        if size < index_bytes:
            raise CorruptData(f"{path} is truncated: {size} bytes, and its index alone takes {index_bytes}")
        footer = np.empty(index_bytes, np.uint8)
        self._read(size - index_bytes, footer)
        self._set_index(footer, rows, views, size - index_bytes, chunk_bytes)

    def _set_index(
        self, footer: npt.NDArray[np.uint8], rows: int, views: int, payload: int, chunk_bytes: int | None
    ) -> None:
        index = np.frombuffer(footer, "<u8", rows * views * 2).reshape(rows, views, 2)
        if crc32c(index) != int.from_bytes(footer[-_CRC_BYTES:].tobytes(), "little"):
            raise CorruptData(f"{self.path} is truncated or damaged: the checksum of its index does not hold")
        self._check_index(index, payload, chunk_bytes)
        self._offsets, self._sizes = index[..., 0], index[..., 1]

    def _check_index(self, index: npt.NDArray[np.uint64], payload: int, chunk_bytes: int | None) -> None:
        present = index[..., 0] != ABSENT
        offsets, sizes = index[present].T
        wrong = (sizes != chunk_bytes).any() if chunk_bytes is not None else (sizes > payload).any()
        if not (present == present[:, :1]).all() or wrong:
            expected = "compressed latents" if chunk_bytes is None else f"latents of {chunk_bytes} bytes"
            raise CorruptData(f"{self.path} is not a shard of {expected}, all views of a row or none")
        if (offsets > payload).any() or (offsets > payload - sizes).any():  # `sizes` are at most `payload` here
            raise CorruptData(f"{self.path} is truncated: its index points behind its {payload} bytes of latents")

    @property
    def valid_rows(self) -> npt.NDArray[np.intp]:
        """Rows of the shard, ascending, whose latents are there."""
        return np.flatnonzero(self._offsets[:, 0] != ABSENT)

    def chunk(self, row: int, view: int) -> npt.NDArray[np.uint8]:
        """The stored bytes of one latent; `CorruptData` if the slot is empty."""
        data = np.empty(int(self._sizes[row, view]), np.uint8)
        self._read(self._offset(row, view), data)
        return data

    def read(self, row: int, view: int, out: npt.NDArray[np.uint8]) -> None:
        """`chunk` of an uncompressed shard into `out`, which has its size."""
        self._read(self._offset(row, view), out)

    def announce(self, row: int, view: int) -> None:
        """Ask the system to read one latent ahead; returns at once."""
        if hasattr(os, "posix_fadvise"):
            size = int(self._sizes[row, view])
            os.posix_fadvise(self._file, self._offset(row, view), size, os.POSIX_FADV_WILLNEED)

    def _read(self, offset: int, out: npt.NDArray[np.uint8]) -> None:
        done = 0
        while done < out.size:
            count = os.preadv(self._file, [out[done:].data], offset + done)
            if not count:
                raise CorruptData(f"{self.path} was cut short while it was read")
            done += count

    def _offset(self, row: int, view: int) -> int:
        offset = self._offsets[row, view]
        if offset == ABSENT:
            raise CorruptData(f"{self.path} has no latent of row {row}, which the store counts as valid")
        return int(offset)
