"""A disk that fills up at any moment: exit 6, the command that goes on, and the same result after some is freed.

Three moments of each kind by default, 30 with RAE_FAULTS=all.
"""

import gc
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rae.stages.training.checkpoints import load
from tests.conftest import FullDisk, Rae
from tests.faults.test_training import EVERY_LOSS

MOMENTS = 30 if os.environ.get("RAE_FAULTS") == "all" else 3
NEEDS = {
    "shards": (),
    "encode": ("shards",),
    "train-decoder": ("shards",),
    "train-dit": ("shards", "latents"),
    "sample": ("shards", "latents", "decoder", "dit"),
    "evaluate": ("shards", "latents", "decoder", "dit", "samples"),
}
MAKES = dict(zip(NEEDS, ("shards", "latents", "decoder", "dit", "samples", "scores"), strict=True))


@pytest.mark.parametrize("verb", NEEDS)
def test_work_goes_on_after_a_full_disk(verb: str, finished: Rae, rae_with: Callable[..., Rae], disk: FullDisk) -> None:
    rae = rae_with(*NEEDS[verb])
    disk.flushes = 0
    rae.verb(verb).succeeded()
    flushes = disk.flushes
    chance = random.Random(f"full {verb}")
    rooms = [0, *chance.sample(range(1, flushes), min(MOMENTS, flushes) - 1)]
    for room in rooms:
        rae = rae_with(*NEEDS[verb])
        disk.flushes, disk.room = 0, room
        rae.verb(verb).refused(6, f"next: rae {verb} {rae.config} -w {rae.workspace}")
        disk.room = None
        rae.verb(verb).succeeded()
        assert rae.payload(MAKES[verb]) == finished.payload(MAKES[verb]), f"full after {room} of {flushes} flushes"
        assert not list(rae.workspace.rglob("*.partial")), f"full after {room} of {flushes} flushes"


def test_a_full_disk_leaves_the_checkpoints_of_an_adversarial_training_whole(
    rae_with: Callable[..., Rae], disk: FullDisk
) -> None:
    case = EVERY_LOSS
    whole = rae_with(*case.needs)
    disk.flushes = 0
    whole.verb(case.verb, *case.options).succeeded()
    flushes, expected = disk.flushes, whole.payload(case.makes)
    chance, checked = random.Random("full adversarial"), 0
    for moment in range(MOMENTS):
        room = int((moment + chance.random()) / MOMENTS * flushes)
        rae = rae_with(*case.needs)
        disk.flushes, disk.room = 0, room
        rae.verb(case.verb, *case.options).refused(6, f"next: rae {case.verb}")
        disk.room = None
        for folder in rae.workspace.glob("objects/decoder/*/attempts/*/checkpoints/step-*"):
            checked += 1
            assert load(folder).tensors.keys() == {"model", "ema", "optimizer", "heads", "disc_optimizer"}
        rae.verb(case.verb, *case.options).succeeded()
        assert rae.payload(case.makes) == expected, f"full after {room} of {flushes} flushes"
    assert checked


class SmallDisk:
    """A file system of its own in memory, of a few kB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, kilobytes: int, *options: str) -> bool:
        size = ",".join(["size=" + f"{kilobytes}k", *options])
        command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(self.folder)]
        try:
            return subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0
        except OSError:
            return False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "small")
    disk.folder.mkdir()
    if not disk.resize(100):
        pytest.skip("mounting a small file system takes root and `mount`")
    yield disk
    gc.collect()  # files that a run's closures still hold open keep the file system busy
    subprocess.run(["umount", str(disk.folder)], check=True, timeout=60)


def test_a_run_on_a_disk_that_is_too_small_goes_on_when_it_grows(
    small_disk: SmallDisk, finished: Rae, tmp_path: Path
) -> None:
    rae = Rae(tmp_path / "rae")
    rae.workspace = small_disk.folder / "workspace"
    sizes = [100, 400, 900, 1500, 4000, 9000]
    for size in sizes:
        small_disk.resize(size, "remount")
        rae.verb("run").refused(6, "next: rae run")
    small_disk.resize(60_000, "remount")
    rae.verb("run").succeeded()
    for kind in ("shards", "latents", "decoder", "dit", "samples", "scores"):
        assert rae.payload(kind) == finished.payload(kind), kind
