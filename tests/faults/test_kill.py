"""Processes that are killed at any moment, and processes that do the same work at once: the result is the same.

Three kills or meetings of each kind by default; with RAE_FAULTS=all, 30 kills, 10 meetings. Trainings are killed in
test_training.py.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Rae, Warm
from tests.faults.test_training import TRANSFORMER

ALL = os.environ.get("RAE_FAULTS") == "all"
KILLS, MEETINGS, CREW_KILLS = (30, 10, 10) if ALL else (3, 3, 1)
# Each verb with what it needs, what it makes, and settings that make it last.
WORK = {
    "encode": (("shards",), "latents", ()),
    "sample": (("shards", "latents", "decoder", "dit"), "samples", ("sample.num_steps=20", "sample.batch_size=2")),
}


@pytest.mark.parametrize("verb", WORK)
def test_killed_work_goes_on_to_the_same_result(verb: str, rae_with: Callable[..., Rae], warm: Warm) -> None:
    needs, makes, settings = WORK[verb]
    options = [word for setting in settings for word in ("-s", setting)]
    rae = rae_with(*needs)
    began = time.monotonic()
    warm.start(rae.words(verb, *options)).wait().succeeded()
    seconds, expected = time.monotonic() - began, rae.payload(makes)
    chance, struck = random.Random(f"kill {verb}"), 0
    for number in range(KILLS):
        rae = rae_with(*needs)
        moment = (number + chance.random()) / KILLS * seconds
        running = warm.start(rae.words(verb, *options))
        time.sleep(moment)
        running.signal(signal.SIGKILL)
        struck += running.wait().code == -signal.SIGKILL
        warm.start(rae.words(verb, *options)).wait().succeeded()
        assert rae.payload(makes) == expected, f"killed after {moment:.3f} of {seconds:.3f} s"
    assert struck


def test_work_that_is_killed_again_and_again_goes_on(rae_with: Callable[..., Rae], warm: Warm) -> None:
    """Each attempt takes over from the one before: killed ones must not lose what they inherited."""
    needs, makes, options = TRANSFORMER.needs, TRANSFORMER.makes, TRANSFORMER.options
    rae = rae_with(*needs)
    began = time.monotonic()
    warm.start(rae.words("train-dit", *options)).wait().succeeded()
    seconds, expected = time.monotonic() - began, rae.payload(makes)
    rae, reached = rae_with(*needs), [0]
    for _ in range(KILLS):
        running = warm.start(rae.words("train-dit", *options))
        time.sleep(seconds * 0.6)
        running.signal(signal.SIGKILL)
        running.wait()
        steps = [int(path.name[-8:]) for path in rae.workspace.glob("objects/dit/*/attempts/*/checkpoints/step-*")]
        reached.append(max(steps, default=0))
    assert reached == sorted(reached)
    warm.start(rae.words("train-dit", *options)).wait().succeeded()
    assert rae.payload(makes) == expected


def test_local_processes_killed_with_the_one_that_started_them(
    finished: Rae, rae_with: Callable[..., Rae], warm: Warm
) -> None:
    """Whoever goes on, alone here, begins with what they have recorded."""
    chance = random.Random("kill a crew")
    for _ in range(CREW_KILLS):
        rae = rae_with("shards")
        running = warm.start(rae.words("encode", "--processes", 2))
        while not any(rae.workspace.glob("objects/latents/*/parts/*.json")):
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)
        running.signal(signal.SIGKILL)
        running.wait()
        warm.start(rae.words("encode")).wait().succeeded()
        assert rae.payload("latents") == finished.payload("latents")


@pytest.mark.parametrize("verb", ["encode", "train-dit", "run"])
def test_two_at_once_make_one_correct_artifact(
    verb: str, finished: Rae, rae_with: Callable[..., Rae], warm: Warm
) -> None:
    for _ in range(MEETINGS if verb == "encode" else 1):
        rae = rae_with(*({"encode": ["shards"], "train-dit": ["shards", "latents"], "run": []}[verb]))
        both = [warm.start(rae.words(verb)) for _ in range(2)]
        for one in both:
            one.wait().succeeded()
        makes = {"encode": ["latents"], "train-dit": ["dit"], "run": ["shards", "latents", "decoder", "dit", "samples"]}
        for kind in makes[verb]:
            assert rae.payload(kind) == finished.payload(kind)
            assert rae.content(kind) == finished.content(kind)
            assert len(list((rae.workspace / "objects" / kind).iterdir())) == 1
        assert not list(rae.workspace.glob("objects/latents/**/.*.partial"))


def test_two_at_once_finish_what_a_killed_one_left(finished: Rae, rae_with: Callable[..., Rae], warm: Warm) -> None:
    rae = rae_with("shards")
    killed = warm.start(rae.words("encode"))
    while not any(rae.workspace.glob("objects/latents/*/parts/*.json")):
        time.sleep(0.002)
    killed.signal(signal.SIGKILL)
    killed.wait()
    for one in [warm.start(rae.words("encode")) for _ in range(2)]:
        one.wait().succeeded()
    assert rae.payload("latents") == finished.payload("latents")


def test_a_reference_that_is_killed_half_way_goes_on_with_the_features_it_has(
    rae_with: Callable[..., Rae], warm: Warm, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1500, 32, 32, 3), dtype=np.uint8)  # two files of features
    np.savez(tmp_path / "images.npz", arr_0=images)
    rae = rae_with()
    words = rae.words("evaluate", "--make-reference", "train", "--images", tmp_path / "images.npz")
    running = warm.start(words)
    while not (found := list(rae.workspace.rglob("features-*-000000.npy"))):
        time.sleep(0.01)
    running.signal(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    said = rae("status", "-w", rae.workspace).succeeded().out
    assert "continue with: rae evaluate --make-reference, with the same arguments and --name tiny-train" in said
    taken = found[0].stat().st_mtime_ns, found[0].read_bytes()
    made = warm.start([*words, "--json"]).wait().succeeded().json
    assert made["metrics"]["images"] == 1500
    assert found[0].stat().st_mtime_ns == taken[0]
    (kept,) = (path for path in Path(made["path"]).rglob("features-*-000000.npy") if path != found[0])
    assert kept.read_bytes() == taken[1]
    rae("verify", "reference/tiny-train", "-w", rae.workspace).succeeded()
