"""Which row comes when, and every draw that belongs to a row: functions of (seed, purpose, epoch, row) alone.

Nothing here depends on batch size, workers, ranks, where data lies, or the version of a library. The primitive is
SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) in counter mode: the
64-bit number of a row is the row-th output of the generator whose state is the first 8 bytes of
BLAKE2b("seed/purpose/epoch"). numpy's `Generator.permutation` is not used because numpy keeps its bit streams stable,
but not what `Generator` makes of them (NEP 19).
"""

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from rae.store.errors import ConfigError

IntArray = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _key(seed: int, purpose: str, epoch: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}/{epoch}".encode(), digest_size=8).digest(), "little")


def _splitmix64(key: int, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Output number `row` of SplitMix64 started at `key`, for each row; arithmetic modulo 2^64."""
    z = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return z ^ (z >> np.uint64(31))


def row_seed(seed: int, purpose: str, epoch: int, row: int) -> int:
    """A seed in [0, 2^64) of a row's own generator, such as `torch.Generator().manual_seed`."""
    z = ((row + 1) * _GOLDEN + _key(seed, purpose, epoch)) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def draw(seed: int, purpose: str, epoch: int, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), one per row: the upper 53 bits of each `row_seed`, times 2^-53."""
    bits = _splitmix64(_key(seed, purpose, epoch), np.asarray(rows))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@lru_cache(maxsize=2)  # batches ask for the epoch that they are in, and for the next one
def epoch_order(rows: int, seed: int, epoch: int) -> IntArray:
    """The global shuffle of an epoch: the permutation of `rows` rows that sorts their numbers. Read-only, int64."""
    order = np.argsort(_splitmix64(_key(seed, "order", epoch), np.arange(rows)), kind="stable")
    order.flags.writeable = False
    return order


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Full global batches in an epoch; the remainder is dropped, another one each epoch."""
    if batch_size < 1:
        raise ConfigError(f"`batch_size` must be at least 1, got {batch_size}")
    return rows // batch_size


def batch_rows(
    rows: int, batch_size: int, seed: int, epoch: int, step: int, rank: int = 0, world_size: int = 1
) -> IntArray:
    """The rows of a rank's share of one global batch: `batch_size / world_size` of them, consecutive in the order.

    The shares of all ranks, one after another, are the global batch, whatever the number of ranks.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not among {world_size} ranks")
    if batch_size % world_size:
        raise ConfigError(f"`batch_size` {batch_size} is not a multiple of the {world_size} ranks that share it")
    if not 0 <= step < steps_per_epoch(rows, batch_size):
        raise IndexError(f"step {step} of an epoch of {steps_per_epoch(rows, batch_size)} steps")
    share = batch_size // world_size
    start = step * batch_size + rank * share
    return epoch_order(rows, seed, epoch)[start : start + share].copy()
