import threading
import time
from contextlib import closing

import pytest

from rae.stages.training.data import prefetch


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_items_come_in_order_for_any_number_of_workers(workers):
    def slow_first(number):
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number * number

    assert list(prefetch(slow_first, range(10), workers)) == [number * number for number in range(10)]


def test_the_next_item_is_made_while_this_one_is_used():
    made = threading.Event()

    def make(number):
        if number == 1:
            made.set()
        return number

    with closing(prefetch(make, range(3), workers=1)) as items:
        assert next(items) == 0
        assert made.wait(5)


def test_no_more_is_made_ahead_than_there_are_workers():
    made = []
    with closing(prefetch(made.append, range(100), workers=2)) as items:
        next(items)
        deadline = time.monotonic() + 5
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == 3  # the one in use and one for each worker


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_out_in_its_turn(workers):
    def make(number):
        if number == 2:
            raise ValueError("bad row")
        return number

    items = prefetch(make, range(5), workers)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="bad row"):
        next(items)


def test_closing_ends_the_threads():
    before = threading.active_count()
    with closing(prefetch(lambda number: number, range(1000), workers=3)) as items:
        next(items)
        assert threading.active_count() > before
    assert threading.active_count() == before
