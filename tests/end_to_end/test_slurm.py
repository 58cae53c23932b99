"""The batch scripts of docs/slurm do what they say, near their limit too, in a shell that plays Slurm."""

import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm import Job
from tests.conftest import Rae


def free_job_id() -> int:
    """A job whose port, 20000 and its number, nobody has."""
    while True:
        number = random.randrange(1, 12_000)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 20_000 + number)):
                return number


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_job_array_encodes_and_a_task_near_its_limit_is_queued_again(
    finished: Rae, rae_with: Callable[..., Rae], tmp_path: Path
) -> None:
    rae = rae_with("shards")
    words, array = rae.words("encode")[1:], {"SLURM_ARRAY_TASK_COUNT": 2}

    def task(attempt: str, number: int) -> Job:
        variables = {"SLURM_JOB_ID": 100 + number, "SLURM_ARRAY_TASK_ID": number, **array}
        return Job(tmp_path / attempt, "encode.sbatch", words, **variables)

    first = task("first", 0)
    first.wait_for(lambda: any(rae.workspace.glob("objects/latents/*/parts/*.json")))
    first.near_its_limit()
    assert (first.wait(), first.requeued) == (6, True), first.output
    assert "stopped by SIGUSR1; what is done is kept" in first.output
    other = task("other", 1)
    again = task("again", 0)
    for job in (other, again):
        assert (job.wait(), job.requeued) == (0, False), job.output
    assert rae.payload("latents") == finished.payload("latents")


def test_two_nodes_train_save_near_the_limit_and_go_on_when_queued_again(
    rae_with: Callable[..., Rae], tmp_path: Path
) -> None:
    rae = rae_with("shards", "latents")
    words = rae.words("train-dit", "-s", "train_dit.steps=200", "-s", "train_dit.checkpoint_every=10")

    def attempt(name: str) -> Job:
        return Job(tmp_path / name, "train.sbatch", words, nodes=2, SLURM_JOB_ID=free_job_id())

    def checkpoints() -> list[int]:
        return [int(path.name[-8:]) for path in rae.workspace.glob("objects/dit/*/attempts/*/checkpoints/step-*")]

    first = attempt("first")
    first.wait_for(lambda: bool(checkpoints()))
    first.near_its_limit()
    assert (first.wait(), first.requeued) == (6, True), first.output
    saved = max(checkpoints())
    assert 0 < saved < 200
    again = attempt("again")
    assert (again.wait(), again.requeued) == (0, False), again.output
    assert f"continued from step {saved}" in again.output
    assert rae.artifact("dit/tiny")["metrics"]["steps"] == 200


def test_a_training_that_fails_is_not_queued_again(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", "train.sbatch", ["train-dit", "missing.yaml"], SLURM_JOB_ID=free_job_id())
    assert job.wait() not in (0, 6)
    assert not job.requeued
