"""Tars of source images wherever they lie: opened once, read at an offset, or front to back."""

import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_BLOCK_BYTES = 1 << 20


class OpenTar(Protocol):
    """A tar that is open for reading; threads may share it."""

    def read_at(self, start: int, count: int) -> bytes:
        """`count` bytes from `start`; fewer where the tar ends."""

    def blocks(self) -> Iterator[bytes]:
        """All of it, in order."""


class Tar(Hashable, Protocol):
    """A tar, open or not; can be pickled, and is the same as another of the same place. `str` says where it lies."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> str:
        """What the tar lies in, with whatever describes it: a path, or a URL."""

    def beside(self, name: str) -> bytes | None:
        """A small file of the same folder; None if it is not there."""

    def stamp(self) -> tuple[int, int | str]:
        """Size in bytes, and what changes with the content."""

    def open(self) -> OpenTar:
        """Raises OSError or `MissingInput` if that is impossible."""


@dataclass(frozen=True)
class LocalTar:
    """A tar that is a file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def folder(self) -> str:
        return str(self.path.parent)

    def beside(self, name: str) -> bytes | None:
        try:
            return self.path.with_name(name).read_bytes()
        except FileNotFoundError:
            return None

    def stamp(self) -> tuple[int, int | str]:
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns

    def open(self) -> OpenTar:
        return _OpenFile(self.path)


class _OpenFile:
    """An open file, closed when the last thread that reads from it has let go of it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_at(self, start: int, count: int) -> bytes:
        return os.pread(self._descriptor, count, start)

    def blocks(self) -> Iterator[bytes]:
        start = 0
        while data := self.read_at(start, _BLOCK_BYTES):
            yield data
            start += len(data)
