"""Where a stage runs: the only place that knows of devices and processes.

torchrun starts processes that train, sample or encode together: `torchrun --nproc-per-node 8 -m rae.pipeline.cli
train-dit CONFIG`. Rank 0 finds, begins and publishes; all ranks work on its attempt. Encoding needs no such company:
parts are done in any order by the workers of dask, local or a cluster's, or by the tasks of a job array.
"""

import logging
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, TypeVar

from rae.store.errors import ConfigError, MissingInput, PartialResult, RaeError

if TYPE_CHECKING:
    from distributed import Client

    from rae.stages.job import Spread
    from rae.stages.training.ranks import Ranks
    from rae.store.manifest import Json  # which loads an array library, and `rae --help` comes by here

Unit = Callable[[str, int], None]  # does the unit of work of a number on a device
_UNITS_IN_FLIGHT = 256  # more than there are workers; a million parts need no million futures
_SECONDS_TO_ANSWER = 30

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process is the one that speaks: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class Alone:
    """What `Ranks` is to a single process, without the seconds that torch takes to load: a done stage needs none."""

    is_main = True

    def broadcast(self, value: T) -> T:
        return value


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


@dataclass(frozen=True)
class Crew:
    """Who encodes: this process, so many local ones, or the workers of a dask scheduler; all parts, or share i of n."""

    processes: int = 1
    scheduler: str | None = None
    share: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        spread = self.scheduler is not None or self.processes > 1
        if self.scheduler is not None and self.processes > 1:
            raise ConfigError("--processes starts workers here and --scheduler takes those that it has: give one")
        if spread and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError("torchrun has started processes already: leave out --processes and --scheduler")


def device_name(device: str) -> str:
    """What a device that torch knows is called: the GPU's model."""
    import torch

    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def provenance(device: str, crew: Crew) -> "Json":
    """What of this machine a reader of the manifest may want to know."""
    import torch

    processes = max(crew.processes, int(os.environ.get("WORLD_SIZE", "1")))
    threads = torch.get_num_threads()
    return {"device": device_name(device), "processes": processes, "torch": torch.__version__, "threads": threads}


def share_of(text: str) -> tuple[int, int]:
    """`3/8` of `--parts` is (3, 8): share number 3 of 8, counted from 0."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--parts {text} is no share: of 8 shares, the first is 0/8 and the last 7/8")
    return int(match[1]), int(match[2])


def spread(crew: Crew, unit: Unit, device: str) -> "Spread | None":
    """What has the crew do units of work; None if this process does them."""
    if crew.processes == 1 and crew.scheduler is None:
        return None
    return partial(_spread, crew, partial(_on_a_worker, unit, device))


def _spread(
    crew: Crew,
    work: Callable[[int], None],
    numbers: Sequence[int],
    done: Callable[[int], None],
    stopping: Callable[[], bool],
) -> None:
    import distributed

    waiting, running = iter(numbers), dict[distributed.Future, int]()
    with _workers(crew) as client:
        try:
            while not stopping():
                while len(running) < _UNITS_IN_FLIGHT and (number := next(waiting, None)) is not None:
                    running[client.submit(work, number, pure=False)] = number
                if not running:
                    return
                try:
                    finished = distributed.wait(list(running), timeout=0.5, return_when="FIRST_COMPLETED").done
                except TimeoutError:
                    continue
                for future in finished:
                    number = running.pop(future)
                    future.result()
                    done(number)
        except distributed.KilledWorker as error:
            raise PartialResult(
                f"the workers that encoded a part died again and again ({error}): out of memory, perhaps"
            ) from error
        except (distributed.CancelledError, distributed.comm.CommClosedError) as error:
            raise PartialResult(f"the dask scheduler {crew.scheduler} is gone; what is done is kept") from error
        except ModuleNotFoundError as error:
            raise MissingInput(f"a dask worker has no module `{error.name}`: install the same rae there") from error


@contextmanager
def _workers(crew: Crew) -> Iterator["Client"]:
    """A dask client, of the scheduler that is named or of a local cluster that lives within the block."""
    import distributed

    if crew.scheduler is None:
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // crew.processes))
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        options = {"threads_per_worker": 1, "env": environment, "dashboard_address": "127.0.0.1:0"}
        # Ctrl-C reaches all processes of a terminal, SIGUSR1 all of a batch system's job, and it is this one that says
        # when workers stop: what the cluster's thread starts, now or later, inherits that both are blocked.
        resource_tracker.ensure_running()  # which would unblock them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})
        try:
            cluster = distributed.LocalCluster(n_workers=crew.processes, silence_logs=logging.ERROR, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with cluster, distributed.Client(cluster) as client:
            yield client
        return
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # it logs as a traceback what is raised anyway
    try:
        client = distributed.Client(crew.scheduler, timeout=_SECONDS_TO_ANSWER)
    except (OSError, ValueError) as error:
        raise MissingInput(f"no dask scheduler answers at {crew.scheduler}", "dask scheduler") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_SECONDS_TO_ANSWER)
        except TimeoutError as error:
            raise MissingInput(
                f"the dask scheduler {crew.scheduler} has no workers", f"dask worker {crew.scheduler} --nthreads 1"
            ) from error
        yield client


def _on_a_worker(unit: Unit, device: str, number: int) -> None:
    """Do a unit of work in a dask worker. Local workers share out the GPUs; others see those of their environment."""
    import distributed
    import torch

    worker = distributed.get_worker()
    place = device_of(device)
    if place == "cuda" and isinstance(worker.name, int):
        place = f"cuda:{worker.name % torch.cuda.device_count()}"
    try:
        unit(place, number)
    except RaeError as error:
        where = f"on the worker {worker.address}, whose folder is {os.getcwd()}"
        raise type(error)(f"{error.message} ({where})", error.next_command) from error
