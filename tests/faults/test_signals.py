"""Ctrl-C and SIGTERM in the middle of a stage: nothing is lost, and the command that is printed goes on."""

import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Rae, Warm

SECONDS = 60
LONG = ("-s", "train_dit.steps=120", "-s", "train_dit.checkpoint_every=10")


def wait_for(found: Callable[[], Iterator[Path]]) -> None:
    """Wait until a file appears that shows a stage at its work."""
    until = time.monotonic() + SECONDS
    while not any(found()):
        assert time.monotonic() < until, "the stage shows no sign of work"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(finished: Rae, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The payload of the long training, in one piece."""
    rae = finished.copy(tmp_path_factory.mktemp("long") / "rae", "shards", "latents")
    rae.verb("train-dit", *LONG).succeeded()
    return rae.payload("dit")


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, "interrupted; what is done is kept"), (signal.SIGTERM, 6, "stopped by SIGTERM")],
)
def test_training_stops_and_the_printed_command_finishes_it(
    number: int, code: int, words: str, uninterrupted: dict[str, str], rae_with: Callable[..., Rae], warm: Warm
) -> None:
    rae = rae_with("shards", "latents")
    running = warm.start(rae.words("train-dit", *LONG))
    wait_for(lambda: rae.workspace.glob("objects/dit/*/attempts/*/checkpoints/step-*"))
    running.signal(number)
    stopped = running.wait().refused(code, words)
    assert not list(rae.workspace.glob("objects/dit/*/manifest.json"))
    steps = [int(path.name[-8:]) for path in rae.workspace.glob("objects/dit/*/attempts/*/checkpoints/step-*")]
    assert 0 < max(steps) < 120
    command = shlex.split(stopped.err.rpartition("next: ")[2])
    assert command == ["rae", *rae.words("train-dit", *LONG)]
    went_on = warm.start(command[1:]).wait().succeeded()
    assert f"continued from step {max(steps)}" in went_on.err
    assert rae.payload("dit") == uninterrupted


def test_encoding_stops_at_a_part_and_goes_on(finished: Rae, rae_with: Callable[..., Rae], warm: Warm) -> None:
    rae = rae_with("shards")
    running = warm.start(rae.words("encode"))
    wait_for(lambda: rae.workspace.glob("objects/latents/*/parts/*.json"))
    running.signal(signal.SIGINT)
    running.wait().refused(130, "next: rae encode")
    records = {path: path.stat().st_mtime_ns for path in rae.workspace.glob("objects/latents/*/parts/*.json")}
    assert not list(rae.workspace.glob("objects/latents/*/manifest.json"))
    assert not list(rae.workspace.glob("objects/latents/**/.*.partial"))
    rae.verb("encode").succeeded()
    assert {path: path.stat().st_mtime_ns for path in records} == records  # not done twice
    assert rae.payload("latents") == finished.payload("latents")


def test_a_run_of_all_stages_stops_and_goes_on(finished: Rae, rae: Rae, warm: Warm) -> None:
    running = warm.start(rae.words("run"))
    wait_for(lambda: rae.workspace.glob("objects/decoder/*/attempts/*/checkpoints/step-*"))
    running.signal(signal.SIGTERM)
    stopped = running.wait().refused(6)
    assert shlex.split(stopped.err.rpartition("next: ")[2]) == ["rae", *rae.words("run")]
    done = warm.start(rae.words("run", "--json")).wait().succeeded().json
    assert [one["reused"] for one in done] == [True, True, False, False, False, False]
    for kind in ("decoder", "dit", "samples", "scores"):
        assert rae.payload(kind) == finished.payload(kind), kind
