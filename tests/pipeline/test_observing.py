"""A training that is watched: trackers, images and a profile, in the workspace and in no artifact."""

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Rae

WATCHED = ("-s", "train_dit.trackers=[tensorboard]", "-s", "train_dit.log_every=2", "--profile", "2")


def test_a_training_is_tracked_and_profiled_and_stays_what_it_is(finished: Rae, rae_with: Callable[..., Rae]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rae = rae_with("shards", "latents", "decoder")
    rae.verb("train-dit", *WATCHED, "-s", "train_dit.evaluate_every=8").succeeded()
    assert rae.payload("dit") == finished.payload("dit")
    (folder,) = (rae.workspace / "runs" / "tensorboard").glob("dit-tiny-*")
    shown: Any = accumulator.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in shown.Scalars("loss")] == [2, 4, 6, 8]
    assert [event.step for event in shown.Scalars("ema_frechet_distance")] == [8]
    assert [event.step for event in shown.Images("samples")] == [8]
    (trace,) = (rae.workspace / "runs" / "profiles" / "dit-tiny").iterdir()
    assert trace.name == "steps-3-4-rank0.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "aten::linear" in names
    rae("verify", "dit/tiny", "-w", rae.workspace).succeeded()


def test_a_decoder_in_training_shows_what_it_makes_of_images(finished: Rae, rae_with: Callable[..., Rae]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rae = rae_with("shards", "latents")
    rae.verb("train-decoder", "-s", "train_decoder.trackers=[tensorboard]").succeeded()
    assert rae.payload("decoder") == finished.payload("decoder")
    (folder,) = (rae.workspace / "runs" / "tensorboard").glob("decoder-tiny-*")
    shown: Any = accumulator.EventAccumulator(str(folder)).Reload().Images("reconstructions")
    assert [event.step for event in shown] == [2, 4, 6]  # with each checkpoint
    assert (shown[0].width, shown[0].height) == (8 * 34 + 2, 2 * 34 + 2)  # eight images, and eight of them made again


def test_a_training_shorter_than_its_profile_leaves_what_there_was(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards", "latents")
    rae.verb("train-dit", "--profile", "100").succeeded()
    assert [one.name for one in (rae.workspace / "runs" / "profiles" / "dit-tiny").iterdir()] == [
        "steps-3-8-rank0.json.gz"
    ]


def test_an_unknown_tracker_is_refused_before_anything_runs(rae: Rae) -> None:
    rae.verb("train-dit", "-s", "train_dit.trackers=[mlflow]").refused(2, "trackers")
