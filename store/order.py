"""Which row comes when, and every draw that belongs to a row: functions of (seed, purpose, epoch, row) alone.

Nothing here depends on batch size, workers, ranks, where data lies, or the version of a library. The primitive is
SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) in counter mode: the
64-bit number of a row is the row-th output of the generator whose state is the first 8 bytes of
BLAKE2b("seed/purpose/epoch"). numpy's `Generator.permutation` is not used because numpy keeps its bit streams stable,
but not what `Generator` makes of them (NEP 19).

Permutations are computed place by place, so that an epoch of any size costs no memory and can be entered anywhere. They
are Feistel networks on a x b >= rows with modular addition, repeated for the few places that fall behind the last row
(Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002: generalized Feistel, cycle walking).
"""

import hashlib
import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from rae.store.errors import ConfigError

IntArray = npt.NDArray[np.int64]
UIntArray = npt.NDArray[np.uint64]

_ROUNDS = 16  # from 12 on, all permutations of up to 6 rows are equally likely within a chi-square test's noise
_BLOCK = 1 << 14  # places that are computed together: single batches would cost numpy's overhead each

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def _key(seed: int, purpose: str, epoch: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}/{epoch}".encode(), digest_size=8).digest(), "little")


def _splitmix64(key: int, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Output number `row` of SplitMix64 started at `key`, for each row; arithmetic modulo 2^64."""
    z = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return z ^ (z >> np.uint64(31))


def row_seeds(seed: int, purpose: str, epoch: int, rows: npt.NDArray[np.integer]) -> UIntArray:
    """A seed in [0, 2^64) for each row: where its own generator begins."""
    return _splitmix64(_key(seed, purpose, epoch), np.asarray(rows))


def draw(seed: int, purpose: str, epoch: int, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), one per row: the upper 53 bits of each of `row_seeds`, times 2^-53."""
    bits = row_seeds(seed, purpose, epoch, rows)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(rows: int, key: int, places: npt.NDArray[np.integer]) -> IntArray:
    """Where a permutation of `rows` rows, drawn by `key`, sends `places` (each in [0, rows)); for rows up to 2^62."""
    a = math.isqrt(max(rows - 1, 0)) + 1
    b = -(-rows // a)
    keys = _splitmix64(key, np.arange(_ROUNDS)).tolist()

    def add(half: UIntArray, other: UIntArray, round_key: int, size: int) -> UIntArray:
        drawn = (_splitmix64(round_key, other) >> np.uint64(32)) * np.uint64(size) >> np.uint64(32)  # in [0, size)
        total = half + drawn
        return np.where(total >= size, total - np.uint64(size), total)

    def walk(x: UIntArray) -> UIntArray:
        high, low = np.divmod(x, np.uint64(a))
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            low = add(low, high, first, a)
            high = add(high, low, second, b)
        return high * np.uint64(a) + low

    sent = walk(np.asarray(places).astype(np.uint64))
    outside = np.flatnonzero(sent >= rows)
    while outside.size:
        sent[outside] = walk(sent[outside])
        outside = outside[sent[outside] >= rows]
    return sent.astype(np.int64)


class GlobalShuffle:
    """`shuffle: global`: every row may come at any place of an epoch."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def at(self, places: IntArray, seed: int, epoch: int) -> IntArray:
        """The rows at `places` of an epoch."""
        return permute(self.rows, _key(seed, "order", epoch), places)


class WindowedShuffle:
    """`shuffle: windowed`: an epoch permutes the parts, takes `window_parts` at a time, and permutes their rows.

    A window is what must lie in fast memory for sequential reading from a slow place. `rows_per_part` counts the
    rows of each part. Memory: some numbers per part.
    """

    def __init__(self, rows_per_part: npt.NDArray[np.integer], window_parts: int) -> None:
        if window_parts < 1:
            raise ConfigError(f"`window_parts` must be at least 1, got {window_parts}")
        self._counts = np.asarray(rows_per_part, dtype=np.int64)
        self._first_row = np.concatenate([[0], np.cumsum(self._counts)])
        self._window_parts = window_parts
        self._parts = lru_cache(2)(self._draw_parts)
        self.rows = int(self._first_row[-1])

    def _draw_parts(self, seed: int, epoch: int) -> tuple[IntArray, IntArray]:
        """An epoch's parts in order, and the place where each begins."""
        parts = permute(self._counts.size, _key(seed, "parts", epoch), np.arange(self._counts.size))
        return parts, np.concatenate([[0], np.cumsum(self._counts[parts])])

    def at(self, places: IntArray, seed: int, epoch: int) -> IntArray:
        """The rows at `places` of an epoch."""
        parts, begins = self._parts(seed, epoch)
        windows = (np.searchsorted(begins, places, side="right") - 1) // self._window_parts
        rows = np.empty_like(places)
        for window in np.unique(windows).tolist():
            here = windows == window
            first = window * self._window_parts
            begin, end = begins[first], begins[min(first + self._window_parts, parts.size)]
            key = _key(seed, f"window {window}", epoch)
            sent = begin + permute(int(end - begin), key, places[here] - begin)
            order = np.searchsorted(begins, sent, side="right") - 1
            rows[here] = self._first_row[parts[order]] + sent - begins[order]
        return rows


Shuffle = GlobalShuffle | WindowedShuffle


@lru_cache(maxsize=8)
def _block(shuffle: Shuffle, seed: int, epoch: int, block: int) -> IntArray:
    return shuffle.at(np.arange(block * _BLOCK, min((block + 1) * _BLOCK, shuffle.rows)), seed, epoch)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Full global batches in an epoch; the remainder is dropped, another one each epoch."""
    if batch_size < 1:
        raise ConfigError(f"`batch_size` must be at least 1, got {batch_size}")
    return rows // batch_size


def batch_rows(
    shuffle: Shuffle, batch_size: int, seed: int, epoch: int, step: int, rank: int = 0, world_size: int = 1
) -> IntArray:
    """The rows of a rank's share of one global batch: `batch_size / world_size` of them, consecutive in the order.

    The shares of all ranks, one after another, are the global batch, whatever the number of ranks.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not among {world_size} ranks")
    if batch_size % world_size:
        raise ConfigError(f"`batch_size` {batch_size} is not a multiple of the {world_size} ranks that share it")
    if not 0 <= step < steps_per_epoch(shuffle.rows, batch_size):
        raise IndexError(f"step {step} of an epoch of {steps_per_epoch(shuffle.rows, batch_size)} steps")
    share = batch_size // world_size
    start = step * batch_size + rank * share
    blocks = range(start // _BLOCK, (start + share - 1) // _BLOCK + 1)
    near = np.concatenate([_block(shuffle, seed, epoch, block) for block in blocks])
    return near[start - blocks.start * _BLOCK :][:share].copy()
