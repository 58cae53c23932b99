"""Images in an npz of any size (ADM's `arr_0`), read from the file as they are needed."""

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rae.stages.models.weights import digest_file
from rae.store.errors import CorruptData, MissingInput, StaleInput

_DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError, NotImplementedError, RuntimeError)
_MAGIC = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class NpzImages:
    """The array `key` [N, H, W, 3] of an npz as a set of images; `labels_key` [N] its labels, if it is there.

    Rows are read in place, forwards; a compressed file is unpacked again from its beginning to go backwards. `digest`
    is the file's sha256. Raises MissingInput, CorruptData for a file that is damaged, StaleInput for an array of
    another kind.
    """

    def __init__(self, path: Path, key: str = "arr_0", labels_key: str = "arr_1") -> None:
        if not path.is_file():
            raise MissingInput(f"{path} is not there")
        self._path, self._key = path, key
        try:
            self._zip = zipfile.ZipFile(path)
            self._file, self._shape = self._opened()
            self.labels: NDArray[np.integer] = self._labels(labels_key)
        except _DAMAGE as error:
            raise CorruptData(f"{path} is no npz with images under `{key}`: {error}") from error
        self._begin = self._file.tell()
        self._row_bytes = int(np.prod(self._shape[1:]))
        self.digest = digest_file(path)

    def read(self, rows: Sequence[int] | range) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """See `ImageSet`. Raises CorruptData for a file that ends early or whose checksum does not match."""
        try:
            images = [np.frombuffer(self._bytes(int(row)), np.uint8) for row in rows]
        except _DAMAGE as error:
            raise CorruptData(f"{self._path} is damaged: {error}") from error
        return np.stack(images).reshape(len(rows), *self._shape[1:]), np.ones(len(rows), np.bool_)

    def _bytes(self, row: int) -> bytes:
        place = self._begin + row * self._row_bytes
        if self._file.tell() != place:
            self._file.seek(place)
        data = self._file.read(self._row_bytes)
        if len(data) != self._row_bytes:
            raise EOFError(f"image {row} is cut off")
        return data

    def _opened(self) -> tuple[IO[bytes], tuple[int, ...]]:
        file = self._zip.open(f"{self._key}.npy")
        shape, fortran, dtype = _header(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or 0 in shape:
            raise StaleInput(f"`{self._key}` of {self._path} is {dtype} {shape}, and images are uint8 [N, H, W, 3]")
        if math.prod(shape) > self._zip.getinfo(f"{self._key}.npy").file_size:
            raise EOFError(f"it says that it holds {shape[0]} images, and is too short for them")
        return file, shape

    def _labels(self, key: str) -> NDArray[np.integer]:
        if f"{key}.npy" not in self._zip.namelist():
            return np.full(self._shape[0], -1)
        with self._zip.open(f"{key}.npy") as file:
            shape, _, dtype = _header(file)
            if shape != (self._shape[0],) or dtype.kind not in "iu":
                raise StaleInput(f"`{key}` of {self._path} is {dtype} {shape}, not a label for each image")
            return np.frombuffer(file.read(shape[0] * dtype.itemsize), dtype, shape[0]).astype(np.int64)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and type of an .npy; ValueError for what is none."""
    version = np.lib.format.read_magic(file)
    if version not in _MAGIC:
        raise ValueError(f"npy of version {version}")
    found: tuple[tuple[int, ...], bool, np.dtype[Any]] = _MAGIC[version](file)
    return found
