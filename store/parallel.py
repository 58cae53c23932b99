"""Work cut into slices for a few threads: reading waits, for a disk or for memory, and Python's lock is free then."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

READERS = 8  # as many reads under way as a disk likes; a copy from the page cache takes two or three of them
_WORTH_IT_BYTES = 1 << 20


def sliced(work: Callable[[range], None], count: int, size_bytes: int) -> None:
    """`work` on slices that make up `range(count)`, which move `size_bytes` in all: by threads where that pays.

    The first exception comes out when all slices are done.
    """
    if size_bytes < _WORTH_IT_BYTES:
        work(range(count))
        return
    slices = [range(count)[first::READERS] for first in range(min(READERS, count))]
    futures = [_pool().submit(work, one) for one in slices]
    wait(futures)
    for future in futures:
        future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, thread_name_prefix="read")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has the pool without its threads
