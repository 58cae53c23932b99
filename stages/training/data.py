"""Batches made ahead of the training step that needs them."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Argument = TypeVar("Argument")
Item = TypeVar("Item")


def prefetch(
    make: Callable[[Argument], Item], arguments: Iterable[Argument], workers: int
) -> Generator[Item, None, None]:
    """`map(make, arguments)` whose next items are made by threads while the caller uses the current one.

    The order is that of the arguments for any number of `workers`, each of which is one item ahead; with 0, `make`
    runs when asked. An exception in `make` comes out in its item's turn. Closing the generator
    (`contextlib.closing`) waits for what is being made and forgets it.
    """
    if not workers:
        yield from map(make, arguments)
        return
    remaining = iter(arguments)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    try:
        queue = deque(pool.submit(make, argument) for argument in islice(remaining, workers))
        while queue:
            item = queue.popleft().result()
            queue.extend(pool.submit(make, argument) for argument in islice(remaining, 1))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
