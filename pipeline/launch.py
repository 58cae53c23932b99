"""Where a stage runs: the only place that knows of devices and processes.

Several processes are started by torchrun: `torchrun --nproc-per-node 8 -m rae.pipeline.cli train-dit CONFIG`. Rank 0
finds, begins and publishes; all ranks work on its attempt.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rae.store.errors import ConfigError
from rae.store.manifest import Json

if TYPE_CHECKING:
    from rae.stages.training.ranks import Ranks

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process is the one that speaks: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class Alone:
    """What `Ranks` is to a single process, without the seconds that torch takes to load: a done stage needs none."""

    is_main = True

    def broadcast(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        """There is nobody to wait for."""


@contextmanager
def processes(device: str) -> Iterator["Ranks | Alone"]:
    """This process among those that torchrun started, connected; alone there is nothing to connect."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Alone()
        return
    from rae.stages.training.ranks import Ranks

    ranks = Ranks.from_environment()
    with ranks.process_group(ranks.device(device_of(device))):
        yield ranks


def device_of(asked: str) -> str:
    """The device that `--device` means; `auto` takes CUDA where there is one, else the CPU."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # its default; `precision: float32` would not mean float32
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {asked}: torch finds no CUDA device on this machine")
    if asked == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: torch finds no Metal device on this machine")
    try:
        return str(torch.device(asked))
    except RuntimeError:
        raise ConfigError(f"--device {asked} is not a device; say cpu, cuda, cuda:1 or mps") from None


def provenance(device: str) -> Json:
    """What of this machine a reader of the manifest may want to know."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
