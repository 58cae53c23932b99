"""Memory for batches, lent again once nobody holds the batch that lay in it.

A fresh array of 50 MB costs more than filling it: the system clears every page at its first touch.
"""

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

_KEPT = 8


class Buffers:
    """Lends arrays. One that its borrower and every view of it have let go of is lent again; threads may share this."""

    def __init__(self) -> None:
        self._free: deque[npt.NDArray[np.uint8]] = deque(maxlen=_KEPT)

    def take(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of this shape and dtype; what stands in it is undefined."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            buffer = self._free.popleft()
        except IndexError:
            buffer = np.empty(size, np.uint8)
        if buffer.size < size:
            buffer = np.empty(size, np.uint8)
        return np.asarray(_Lease(buffer, self._free))[:size].view(dtype).reshape(shape)


class _Lease:
    """What lent arrays have as their base; it goes when the last of them goes, and gives the memory back."""

    def __init__(self, buffer: npt.NDArray[np.uint8], free: deque[npt.NDArray[np.uint8]]) -> None:
        self.__array_interface__ = buffer.__array_interface__
        self._buffer, self._free = buffer, free

    def __del__(self) -> None:
        self._free.append(self._buffer)
