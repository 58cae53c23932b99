"""Encoding by dask's workers, local ones and those of an external scheduler, some of which die."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import Rae, Ran, Warm

# Parts that take a while, so that a worker can be killed in the middle of one.
SLOW = ("-s", "encode.rows_per_part=16", "-s", "encode.encoder_input_size=256")
SECONDS = 120


def processes_below(pid: int, words: str) -> list[psutil.Process]:
    """The processes that `pid` has started, and those that they have, whose command line has these words."""
    return [child for child in psutil.Process(pid).children(recursive=True) if words in " ".join(child.cmdline())]


def wait_until(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, f"waited {SECONDS} s for {what}"
        time.sleep(0.05)


def records(rae: Rae) -> list[Path]:
    return list(rae.workspace.glob("objects/latents/*/parts/*.json"))


@pytest.fixture(scope="module")
def alone(finished: Rae, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The payload of the slow encode by one process."""
    rae = finished.copy(tmp_path_factory.mktemp("alone") / "rae", "shards")
    rae.verb("encode", *SLOW).succeeded()
    return rae.payload("latents")


def test_two_local_processes_one_of_which_is_killed(
    alone: dict[str, str], rae_with: Callable[..., Rae], warm: Warm
) -> None:
    rae = rae_with("shards")
    running = warm.start(rae.words("encode", "--processes", 2, *SLOW))
    wait_until(lambda: records(rae), "the first part")
    workers = processes_below(running.pid, "spawn_main")
    assert len(workers) >= 2
    workers[-1].kill()
    running.wait().succeeded()
    assert rae.payload("latents") == alone


class Cluster:
    """`dask scheduler` and `dask worker`s on this machine, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        self._processes: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        words = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
        self.scheduler = self._start(*words)
        wait_until(file.exists, "the scheduler")
        self.address: str = json.loads(file.read_text())["address"]

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", *words]
        with open(self._folder / f"{words[0]}.log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment, cwd=self._folder)
        self._processes.append(process)
        return process

    def worker(self) -> subprocess.Popen[bytes]:
        return self._start("worker", self.address, "--nthreads", "1", "--no-dashboard", "--no-nanny")

    def close(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("dask"))
    yield cluster
    cluster.close()


def encode(rae: Rae, cluster: Cluster, warm: Warm) -> Callable[[], Ran]:
    return warm.start(rae.words("encode", "--scheduler", cluster.address, *SLOW)).wait


def test_the_workers_of_a_scheduler_one_of_which_is_killed(
    alone: dict[str, str], rae_with: Callable[..., Rae], cluster: Cluster, warm: Warm
) -> None:
    first, _ = cluster.worker(), cluster.worker()
    rae = rae_with("shards")
    ended = encode(rae, cluster, warm)
    wait_until(lambda: records(rae), "the first part")
    first.send_signal(signal.SIGKILL)
    ended().succeeded()
    assert rae.payload("latents") == alone


def test_a_worker_that_finds_other_images_refuses(rae_with: Callable[..., Rae], cluster: Cluster, warm: Warm) -> None:
    """Nothing but numbers of parts travels: each worker looks for itself, from the folder that it runs in."""
    cluster.worker()
    rae = rae_with("shards")
    source = next(rae.workspace.glob("objects/shards/*/attempts/*/train-*.tar")).parent
    (rae.folder / "here").symlink_to(source)
    words = rae.words("encode", "--scheduler", cluster.address, "-s", "shards.train=here/train-*.tar")
    words += ["-s", "shards.val_fraction=0", "-s", "shards.limit=null"]
    before = os.getcwd()
    os.chdir(rae.folder)
    try:
        refused = rae(*words)
    finally:
        os.chdir(before)
    refused.refused(3, "here/train-*.tar names no file", "on the worker tcp://", "whose folder is")


def test_a_scheduler_that_dies_leaves_what_is_done(
    alone: dict[str, str], rae_with: Callable[..., Rae], cluster: Cluster, warm: Warm
) -> None:
    cluster.worker()
    rae = rae_with("shards")
    ended = encode(rae, cluster, warm)
    wait_until(lambda: records(rae), "the first part")
    cluster.scheduler.kill()
    ended().refused(6, f"the dask scheduler {cluster.address} is gone; what is done is kept", "next: rae encode")
    rae.verb("encode", *SLOW).succeeded()
    assert rae.payload("latents") == alone
