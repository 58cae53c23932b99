"""Rows that lie in a bucket, brought near before they are read: many requests at once, none twice."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from threading import Lock

from rae.store.formats import StoredArray
from rae.store.remote_shard import Chunk, RemoteShard
from rae.store.zarr_shard import Shard

REQUESTS = 32  # under way at once: a bucket answers one in tens of milliseconds, whatever else it answers

Place = tuple[int, int, int]  # part, row of it, view


class Nearby:
    """Brings latents near, a part at a time. Threads may share it."""

    def __init__(self, shard: Callable[[int, StoredArray], Shard], arrays: tuple[StoredArray, ...]) -> None:
        self._shard, self._arrays = shard, arrays
        self._under_way: dict[Place, Future[None]] = {}
        self._opened = set[int]()
        self._lock = Lock()

    def bring(self, places: Iterable[Place]) -> None:
        """Return when all of `places` are near; the first exception comes out."""
        futures = self.begin(places)
        wait(futures)
        for future in futures:
            future.result()

    def begin(self, places: Iterable[Place]) -> set[Future[None]]:
        """Begin to bring near what is not and is not under way; what to wait for."""
        futures, by_part = set[Future[None]](), dict[int, list[Place]]()
        missing = [place for place in places if not self._is_near(*place)]
        if not missing:
            return futures
        with self._lock:
            for place in missing:
                if (future := self._under_way.get(place)) is not None:
                    futures.add(future)
                else:
                    by_part.setdefault(place[0], []).append(place)
            for part, some in by_part.items():
                future = _pool().submit(self._bring_part, part, some)
                self._under_way.update(dict.fromkeys(some, future))
                futures.add(future)
        return futures

    def _is_near(self, part: int, row: int, view: int) -> bool:
        if part not in self._opened:  # opening a shard may take a request of its own
            return False
        shards = (self._shard(part, array) for array in self._arrays)
        return all(not isinstance(shard, RemoteShard) or shard.is_near(row, view) for shard in shards)

    def _bring_part(self, part: int, places: list[Place]) -> None:
        try:
            for array in self._arrays:
                shard = self._shard(part, array)
                if isinstance(shard, RemoteShard):
                    missing: list[Chunk] = [(row, view) for _, row, view in places if not shard.is_near(row, view)]
                    if missing:
                        shard.fetch(missing)
            self._opened.add(part)
        finally:
            with self._lock:
                for place in places:
                    self._under_way.pop(place, None)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(REQUESTS, thread_name_prefix="fetch")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has the pool without its threads
