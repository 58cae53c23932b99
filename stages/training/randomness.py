"""Random numbers of a training row: a function of (seed, purpose, epoch, row) and of nothing else.

A draw stays the same whatever the batch size, the worker, the number of ranks, or the version of PyTorch, and on a GPU
but for its rounding of log and cos. `purpose` keeps the draws of one row apart ("noise", "time", ...).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rae.store.order import GOLDEN, MIX_1, MIX_2, draw, row_seeds

Rows = Sequence[int] | np.ndarray

_TOGETHER = 1 << 14  # pairs of numbers that a CPU's cache holds with all that they are made of


def normal(
    shape: Sequence[int], seed: int, purpose: str, epoch: int, rows: Rows, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal numbers [len(rows), *shape], float32, at most 6.7 from 0.

    Each row's are made two by two (Box and Muller, 1958) of the outputs of SplitMix64 started at its `row_seeds`.
    """
    numbers = math.prod(shape)
    pairs = (numbers + 1) // 2
    starts = torch.from_numpy(row_seeds(seed, purpose, epoch, np.asarray(rows)).view(np.int64)).to(device)
    steps = torch.arange(1, pairs + 1, device=device) * _signed(GOLDEN)
    drawn = torch.empty(len(starts), 2, pairs, device=device)
    chunk = max(1, _TOGETHER // max(pairs, 1)) if drawn.device.type == "cpu" else max(len(starts), 1)
    for first in range(0, len(starts), chunk):
        out = drawn[first : first + chunk]
        bits = _mix(starts[first : first + chunk, None] + steps)
        radius = ((_shifted(bits, 32) + 1).float() * 2**-32).log_().mul_(-2).sqrt_()  # of numbers in (0, 1]
        angle = (bits & 0xFFFFFFFF).float() * (2**-31 * math.pi)
        torch.mul(radius, angle.cos(), out=out[:, 0])
        torch.mul(radius, angle.sin_(), out=out[:, 1])
    return drawn.flatten(1)[:, :numbers].reshape(len(starts), *shape)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function, in place: PyTorch has no arithmetic of unsigned numbers, but signed ones wrap."""
    z ^= _shifted(z, 30)
    z *= _signed(MIX_1)
    z ^= _shifted(z, 27)
    z *= _signed(MIX_2)
    z ^= _shifted(z, 31)
    return z


def _shifted(z: Tensor, bits: int) -> Tensor:
    """The 64 bits of `z` shifted right, zeros coming in."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """A 64-bit number as PyTorch reads it."""
    return number - (1 << 64) if number >= 1 << 63 else number


def uniform(seed: int, purpose: str, epoch: int, rows: Rows, device: torch.device | str = "cpu") -> Tensor:
    """Numbers in [0, 1), float32, [len(rows)]; the same on every device."""
    numbers = draw(seed, purpose, epoch, np.asarray(rows))
    # Cut to the 24 bits that a float32 holds: rounding would make 1.0 of the largest.
    return torch.from_numpy(np.floor(numbers * 2**24) * 2.0**-24).to(device, torch.float32)
