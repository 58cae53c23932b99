"""Tars of source images that lie in a bucket or on a web server: read where they lie, a block at a time.

Blocks stay in the cache of ranges (`rae.store.range_cache`), which all processes of a machine share: whoever scans a
tar, verifies it and reads its images asks for each byte once. Where the cache has no room, images are read alone.
"""

import fnmatch
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from urllib.parse import urlsplit

from rae.store.bucket import Bucket
from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.range_cache import RangeFile, range_folder, shared_budget
from rae.store.remote import check_url
from rae.store.tars import OpenTar

BLOCK_BYTES = 1 << 20  # some ten images of ImageNet's size
_AHEAD = 8
_LOCKS = 16
_MAGIC = set("*?[")


@dataclass(frozen=True)
class RemoteTar:
    """The tar `name` below the URL `bucket.place`."""

    bucket: Bucket
    name: str

    def __str__(self) -> str:
        return f"{self.bucket.place}/{self.name}"

    @property
    def folder(self) -> str:
        return self.bucket.place

    def beside(self, name: str) -> bytes | None:
        try:
            return self.bucket.read(name)
        except MissingInput:  # who may not list a bucket is refused what is not there
            return None

    def stamp(self) -> tuple[int, int | str]:
        found = self.bucket.version(self.name)
        if found is None:
            raise MissingInput(f"{self} does not exist")
        return found

    def open(self) -> OpenTar:
        return _OpenRemoteTar(self)


class _OpenRemoteTar:
    def __init__(self, tar: RemoteTar) -> None:
        self._tar = tar
        self._size, version = tar.stamp()
        self._blocks = -(-self._size // BLOCK_BYTES)
        name = hashlib.sha256(f"{tar} {version}".encode()).hexdigest()[:32]
        budget = shared_budget(range_folder())
        self._ranges = RangeFile(range_folder() / "sources" / name, self._size, self._blocks, budget)
        self._is_full = False
        self._locks = [Lock() for _ in range(_LOCKS)]

    def read_at(self, start: int, count: int) -> bytes:
        count = max(0, min(count, self._size - start))
        if not count:
            return b""
        if all(map(self._bring, range(start // BLOCK_BYTES, -(-(start + count) // BLOCK_BYTES)))):
            return os.pread(self._ranges.handle, count, start)
        return self._ask(start, count)

    def blocks(self) -> Iterator[bytes]:
        under_way = deque[Future[bytes]]()
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="tar") as pool:
            try:
                for block in range(self._blocks):
                    if len(under_way) == _AHEAD:
                        yield under_way.popleft().result()
                    under_way.append(pool.submit(self.read_at, block * BLOCK_BYTES, BLOCK_BYTES))
                while under_way:
                    yield under_way.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _bring(self, block: int) -> bool:
        """See to it that a block is in the cache; False if there is no room for it."""
        if self._ranges.has(block):
            return True
        if self._is_full:
            return False
        with self._locks[block % _LOCKS]:  # threads that want images of one block ask for it once
            if self._ranges.has(block):
                return True
            start = block * BLOCK_BYTES
            data = self._ask(start, min(BLOCK_BYTES, self._size - start))
            if not self._ranges.keep(block, start, data):
                self._is_full = True
            return not self._is_full

    def _ask(self, start: int, count: int) -> bytes:
        data = bytes(self._tar.bucket.read_ranges(self._tar.name, [start], [count])[0])
        if len(data) != count:
            raise CorruptData(f"{self._tar} was cut short while it was read")
        return data


def remote_tars(urls: list[str]) -> list[RemoteTar]:
    """The tars at URLs, in order; in a bucket, the last part of one may be a pattern (`*`, `?`, `[...]`).

    Raises `ConfigError` for URLs that can't be meant, `MissingInput` for a pattern that nothing matches.
    """
    found = []
    for url in urls:
        check_url(url)
        place, _, name = url.rpartition("/")
        bucket = Bucket(place)
        found += [RemoteTar(bucket, one) for one in (_matching(bucket, name) if _MAGIC & set(name) else [name])]
    return found


def _matching(bucket: Bucket, pattern: str) -> list[str]:
    if urlsplit(bucket.place).scheme in ("http", "https"):
        raise ConfigError(
            f"{bucket.place}/{pattern}: a web server lists no files; name them with braces, train-{{0000..0099}}.tar"
        )
    keys = (stored.key for stored in bucket.below(""))
    if found := sorted(key for key in keys if "/" not in key and fnmatch.fnmatchcase(key, pattern)):
        return found
    raise MissingInput(f"{bucket.place}/{pattern} names no file")
