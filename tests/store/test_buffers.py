"""Memory is lent again when nobody holds it, and never before."""

import numpy as np

from rae.store.buffers import Buffers


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_that_was_let_go_is_lent_again() -> None:
    buffers = Buffers()
    first = buffers.take((4, 3), np.float32)
    where = address(first)
    del first
    again = buffers.take((2, 2), np.float16)
    assert (address(again), again.shape, again.dtype) == (where, (2, 2), np.float16)


def test_a_view_keeps_its_memory() -> None:
    buffers = Buffers()
    view = buffers.take((4, 3), np.float32)[1:].reshape(-1)[::2]
    view[:] = 7
    for _ in range(20):
        buffers.take((4, 3), np.float32)[:] = 0
    assert (view == 7).all()


def test_a_larger_array_gets_memory_of_its_own() -> None:
    buffers = Buffers()
    buffers.take((2,), np.uint8)
    assert buffers.take((100,), np.float32).nbytes == 400
