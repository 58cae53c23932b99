"""Parts of large objects, kept on this machine as they were read: sparse files that all its processes share.

A file of the cache has the size of its object, and behind that a byte per chunk that says whether the chunk is there.
It is written after the chunk, so that a process that is killed leaves nothing half. What a machine that lost power
leaves may be anything: the files lie below the boot's own name, and no later boot believes them, nor does another
machine with the same home folder.

The cache is bounded (RAE_CACHE_GB, by default 100, and a twentieth of the disk stays free). A full one first drops
files that nobody has used for an hour, then keeps what it has: rows come in a random order, so that no row is likelier
to be asked for again than another, and making room for one would cost another.
"""

import contextlib
import os
import shutil
import time
import weakref
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from rae.store.cache import cache_folder
from rae.store.errors import ConfigError
from rae.store.publish import temporary_name

_IDLE_S = 3600.0
_FREE_SHARE = 0.05


class RangeFile:
    """The cached chunks of one object of `size` bytes, numbered from 0 to `chunks`. Threads and processes share it."""

    def __init__(self, path: Path, size: int, chunks: int, budget: "Budget") -> None:
        self._size, self._budget = size, budget
        self._known = np.zeros(chunks, np.uint8)
        self.handle = _open(path, size + chunks)
        weakref.finalize(self, os.close, self.handle)
        self._look()

    def has(self, chunk: int) -> bool:
        """Whether a chunk is there."""
        if not self._known[chunk]:
            self._look()  # another process may have brought it
        return bool(self._known[chunk])

    def keep(self, chunk: int, offset: int, data: Any) -> bool:
        """Keep a chunk, which begins at `offset`, if there is room; returns whether it is kept."""
        if not self._budget.admits(len(data)):
            return False
        try:
            os.pwrite(self.handle, data, offset)
            os.pwrite(self.handle, b"\1", self._size + chunk)
        except OSError:  # a full disk costs time, nothing else
            return False
        self._known[chunk] = 1
        return True

    def _look(self) -> None:
        self._known = np.frombuffer(os.pread(self.handle, self._known.size, self._size), np.uint8).copy()


class Budget:
    """What the cache may still take, counted anew every so often, since other processes fill it too."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root, self._limit = root, limit_bytes
        self._step = max(1, min(1 << 28, limit_bytes // 16))
        self._left, self._looked, self._lock = 0, -np.inf, Lock()

    def admits(self, count: int) -> bool:
        """Whether `count` bytes more may be kept."""
        with self._lock:
            if self._left < count and time.monotonic() - self._looked > 1:
                self._left = min(self._step, self._room(count))
                self._looked = time.monotonic()
            if self._left < count:
                return False
            self._left -= count
            return True

    def _room(self, count: int) -> int:
        files = [(path, status) for path in self._root.rglob("*") if (status := _status(path)) is not None]
        used = sum(status.st_blocks * 512 for _, status in files)
        disk = shutil.disk_usage(self._root)
        room = min(self._limit - used, disk.free - int(_FREE_SHARE * disk.total))
        for path, status in sorted(files, key=lambda one: one[1].st_mtime):
            if room >= count or time.time() - status.st_mtime < _IDLE_S:
                break
            path.unlink(missing_ok=True)  # whoever has it open reads on
            room += status.st_blocks * 512
        return room


def range_folder() -> Path:
    """Where this boot of this machine keeps ranges."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = f"{os.uname().nodename}"
    return cache_folder() / "ranges" / boot


@cache
def shared_budget(folder: Path) -> Budget:
    """What this process may keep in `folder`, one of `range_folder`; `ConfigError` if RAE_CACHE_GB is no number."""
    text = os.environ.get("RAE_CACHE_GB", "100")
    try:
        limit = float(text)
    except ValueError as error:
        raise ConfigError(f"RAE_CACHE_GB is {text!r}, and must be a number of gigabytes") from error
    root = cache_folder() / "ranges"
    root.mkdir(parents=True, exist_ok=True)
    return Budget(root, int(limit * 1e9))


def _open(path: Path, size: int) -> int:
    """The file at `path`, of this size; made if it is not there. It appears with its size."""
    with contextlib.suppress(FileNotFoundError):
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if os.fstat(handle).st_size == size:
            os.utime(path)
            return handle
        os.close(handle)  # of another object by the same name
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.ftruncate(handle, size)
    try:
        os.link(temporary, path)
    except FileExistsError:  # another process was first: its file is as good
        os.close(handle)
        return _open(path, size)
    except OSError:
        pass  # without links it is this process's own
    finally:
        temporary.unlink(missing_ok=True)
    return handle


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat() if path.is_file() else None
    except FileNotFoundError:
        return None
