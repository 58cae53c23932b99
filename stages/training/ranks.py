"""The processes that train together, as torchrun starts them: who we are, our share of a batch, what we agree on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Self, TypeVar

import torch
from torch import Tensor, distributed

from rae.store.errors import ConfigError

T = TypeVar("T")

# Ranks wait for the slowest one's last part, or for rank 0 to hash a terabyte; torch would give up after half an hour.
# torchrun ends the others when one process dies, so nobody waits for the dead.
_PATIENCE = timedelta(days=7)
_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size`. Alone (the default) nothing is communicated.

    Every method that communicates must be called by all ranks, in the same order, inside `process_group`.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Self:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, which torchrun sets; without them there is one process."""
        read = {key: os.environ.get(key, default) for key, default in _VARIABLES.items()}
        try:
            return cls(*map(int, read.values()))
        except ValueError as error:
            raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, and they are {read}") from error

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """This process's own device of a kind: `cuda` becomes `cuda:LOCAL_RANK`."""
        return torch.device(kind, self.local_rank) if kind == "cuda" else torch.device(kind)

    @contextmanager
    def process_group(self, device: torch.device) -> Iterator[None]:
        """Connect the ranks: gloo for tensors on the CPU, nccl on CUDA. Alone, or connected already, nothing to do."""
        if self.world_size == 1 or distributed.is_initialized():
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, rank=self.rank, world_size=self.world_size, timeout=_PATIENCE)
        try:
            yield
            self.barrier()  # leave together: a rank that goes while another still speaks to it may abort
        finally:
            distributed.destroy_process_group()

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks of a floating point tensor; a new tensor, on the same device, without gradient."""
        mean = tensor.detach().clone()
        if self.world_size > 1:
            distributed.all_reduce(mean)
            mean /= self.world_size
        return mean

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank. Agreed on the CPU, so no rank waits for its GPU."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag))
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return bool(flags)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            distributed.all_gather_object(values, value)
        return values


ALONE = Ranks()
