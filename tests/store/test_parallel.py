"""Slices run at once, and none is at work any more when the call comes back."""

import threading
import time

import pytest

from rae.store.parallel import READERS, sliced

MANY_BYTES = 1 << 30


@pytest.mark.parametrize("count", [0, 1, READERS - 1, READERS, 100])
@pytest.mark.parametrize("size_bytes", [1, MANY_BYTES])
def test_every_number_is_worked_on_once(count: int, size_bytes: int) -> None:
    seen: list[int] = []
    sliced(seen.extend, count, size_bytes)
    assert sorted(seen) == list(range(count))


def test_a_failure_comes_out_when_all_other_slices_are_done() -> None:
    """Else a caller that lends the memory again would have it written to."""
    done = threading.Semaphore(0)

    def work(some: range) -> None:
        if some[0] == 0:
            raise ValueError("the first slice")
        time.sleep(0.05)
        done.release()

    with pytest.raises(ValueError, match="the first slice"):
        sliced(work, READERS, MANY_BYTES)
    for _ in range(READERS - 1):
        assert done.acquire(blocking=False)
