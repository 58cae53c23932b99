"""Scores while a transformer trains: those that its checkpoint gets afterwards, and nothing else changes."""

import json
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from rae.store.artifacts import Workspace
from tests.conftest import TINY, Rae, Warm

EVERY = ("-s", "train_dit.evaluate_every=4", "-s", "train_dit.keep_best=frechet_distance")
STEPS = TINY["train_dit"]["steps"]


def scored(rae: Rae) -> dict[int, dict[str, Any]]:
    """The lines of the log that hold scores, by step."""
    log = Workspace(rae.workspace).resolve("dit/tiny").payload / "metrics.jsonl"
    lines = map(json.loads, log.read_text().splitlines())
    return {line["step"]: line for line in lines if "ema_frechet_distance" in line}


@pytest.fixture(scope="module")
def watched(finished: Rae, tmp_path_factory: pytest.TempPathFactory) -> Rae:
    """The small pipeline with a transformer that was scored every 4 of its 8 steps. Shared: read it, or `copy` it."""
    rae = finished.copy(tmp_path_factory.mktemp("watched"), "shards", "latents", "decoder")
    rae.verb("train-dit", *EVERY).succeeded()
    return rae


def test_weights_do_not_depend_on_being_scored(finished: Rae, watched: Rae) -> None:
    assert watched.artifact("dit/tiny")["id"] == finished.artifact("dit/tiny")["id"]
    assert watched.content("dit") == finished.content("dit")
    assert not list(watched.workspace.glob("objects/dit/*/attempts/*/online"))


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_scores_online_are_those_afterwards(watched: Rae, weights: str) -> None:
    online = scored(watched)
    assert list(online) == [4, STEPS]
    watched.verb("evaluate", "-s", f"sample.weights={weights}").succeeded()
    offline = watched.artifact("scores/tiny")["metrics"]
    for metric in ("frechet_distance", "precision", "recall", "class_agreement", "transfer_accuracy"):
        assert online[STEPS][f"{weights}_{metric}"] == pytest.approx(offline[metric], rel=1e-6), metric


def test_the_step_that_scores_best_is_kept(watched: Rae) -> None:
    online = scored(watched)
    best = min(online, key=lambda step: online[step]["ema_frechet_distance"])
    assert watched.artifact("dit/tiny-best")["metrics"]["steps"] == best
    assert watched.artifact("dit/tiny@step=4")["metrics"]["steps"] == 4  # the first is the best so far


def test_a_training_killed_while_it_is_scored_scores_that_step_again(
    watched: Rae, rae_with: Callable[..., Rae], warm: Warm
) -> None:
    rae = rae_with("shards", "latents", "decoder")
    running = warm.start(rae.words("train-dit", *EVERY))
    while not any(rae.workspace.glob("objects/dit/*/attempts/*/online/ema/samples/images/*.npz")):
        time.sleep(0.01)
    running.signal(signal.SIGKILL)
    running.wait()
    rae.verb("train-dit", *EVERY).succeeded()
    assert rae.content("dit") == watched.content("dit")
    assert scored(rae).keys() == {4, STEPS}
    for step, line in scored(rae).items():
        assert line["ema_frechet_distance"] == scored(watched)[step]["ema_frechet_distance"]


def test_what_can_not_be_scored_is_refused_before_it_trains(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards", "latents", "decoder")
    own = ("-s", "sample.guide=step=3", "-s", "sample.guidance_scale=1.5")
    rae.verb("train-dit", *EVERY, *own).refused(2, "guided by a milestone of the training itself")
    rae.verb("train-dit", "-s", "train_dit.keep_best=frechet_distance").refused(2, "`evaluate_every`")
    rae_with("shards", "latents").verb("train-dit", *EVERY).refused(3, "has no decoder")
