"""Random numbers of a training row: a function of (seed, purpose, epoch, row) and of nothing else.

A draw stays the same whatever the batch size, the worker or the number of ranks. `purpose` keeps the draws of one row
apart ("noise", "time", ...).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rae.store.order import draw, row_seed

Rows = Sequence[int] | np.ndarray


def normal(
    shape: Sequence[int], seed: int, purpose: str, epoch: int, rows: Rows, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal numbers [len(rows), *shape], float32, drawn on `device` by a generator per row.

    A GPU draws other numbers than the CPU does. PyTorch's CPU generator takes the lower 32 bits of a seed: two rows
    of a run of 10^5 draws may get the same noise, at chance places.
    """
    numbers = torch.empty(len(rows), *shape, device=device)
    generator = torch.Generator(device)
    for number, row in zip(numbers, rows, strict=True):
        # manual_seed takes 64 bits, read as signed in places: 63 are safe in all.
        generator.manual_seed(row_seed(seed, purpose, epoch, int(row)) & (2**63 - 1))
        number.normal_(generator=generator)
    return numbers


def uniform(seed: int, purpose: str, epoch: int, rows: Rows, device: torch.device | str = "cpu") -> Tensor:
    """Numbers in [0, 1), float32, [len(rows)]; the same on every device."""
    numbers = draw(seed, purpose, epoch, np.asarray(rows))
    # Cut to the 24 bits that a float32 holds: rounding would make 1.0 of the largest.
    return torch.from_numpy(np.floor(numbers * 2**24) * 2.0**-24).to(device, torch.float32)
