"""Trackers are told a run's numbers, images and settings, over resumes, without a network and without a secret."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rae.stages.job import Job, Observed
from rae.stages.training import trackers
from rae.stages.training.metrics_log import MetricsLog
from rae.stages.training.trackers import begin_trackers
from rae.store.errors import ConfigError, MissingInput

SECRET = "cafe0123" * 5
IMAGES = np.full((1, 8, 8, 3), 200, np.uint8)


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, and nothing of this machine's accounts and folders."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "WANDB_SILENT": "true",
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_DATA_DIR": str(tmp_path / "data"),
        "TRACKIO_DIR": str(tmp_path / "runs" / "trackio"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["rae", "train-dit", "-w", f"s3://{SECRET}@bucket"])


def job(tmp_path: Path, attempt: str, *earlier: str) -> Job:
    observed = Observed("dit/mine", {"config": {"train_dit": {"lr": 0.25}}}, tmp_path / "runs")
    return Job(tmp_path / attempt, tuple(tmp_path / one for one in earlier), observed=observed)


def follow(name: str, job: Job, after: int, steps: int) -> None:
    """A training that goes on after `after` steps, for so many."""
    told = begin_trackers([name], job, after)
    log = MetricsLog(job.folder, after, trackers=told)
    for step in range(after + 1, after + steps + 1):
        log.log(step=step, loss=1 / step, skipped="a word")
    log.trackers.images(after + steps, "samples", IMAGES)
    assert log.trackers, "a tracker failed"
    told.close()


def run_ids(tmp_path: Path) -> set[str]:
    return {json.loads(path.read_text())["run"] for path in tmp_path.glob("*/tracked.json")}


def test_tensorboard_shows_one_run_without_what_was_lost(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    follow("tensorboard", job(tmp_path, "one"), 0, 5)
    follow("tensorboard", job(tmp_path, "two", "one"), 3, 4)  # its checkpoint was that of step 3
    (folder,) = (tmp_path / "runs" / "tensorboard").iterdir()
    shown: Any = accumulator.EventAccumulator(str(folder)).Reload()
    scalars = shown.Scalars("loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5, 6, 7]
    assert scalars[6].value == pytest.approx(1 / 7)
    assert shown.Images("samples")
    assert "0.25" in shown.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert len(run_ids(tmp_path)) == 1


def test_wandb_offline_keeps_the_run_and_no_secret(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    follow("wandb", job(tmp_path, "one"), 0, 2)
    follow("wandb", job(tmp_path, "two", "one"), 2, 2)
    (run,) = run_ids(tmp_path)
    found = list((tmp_path / "runs" / "wandb").glob("offline-run-*"))
    assert found
    assert all(path.name.endswith(run) for path in found)
    written = b"".join(path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file())
    assert b"train_dit" in written
    assert b"loss" in written
    assert SECRET.encode() not in written
    assert list((tmp_path / "runs" / "wandb").rglob("samples_4_*.png"))


def test_trackio_resumes_the_run(tmp_path: Path) -> None:
    trackio = pytest.importorskip("trackio")
    assert trackio
    follow("trackio", job(tmp_path, "one"), 0, 2)
    follow("trackio", job(tmp_path, "two", "one"), 2, 2)
    (run,) = run_ids(tmp_path)
    assert list(tmp_path.rglob(f"*{run}*/**/*.png")), "the image of the run"


def test_another_training_is_another_run(tmp_path: Path) -> None:
    for name in ("one", "two"):
        follow("tensorboard", job(tmp_path, name), 0, 1)
    assert len(run_ids(tmp_path)) == 2


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingInput, match="trackio, which is not installed") as refusal:
        begin_trackers(["trackio"], job(tmp_path, "one"), 0)
    assert refusal.value.next_command == 'pip install "rae-pipeline[trackio]"'


def test_a_tracker_that_cannot_begin_says_why_and_one_that_fails_on_the_way_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = types.ModuleType("trackio")
    monkeypatch.setitem(sys.modules, "trackio", broken)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="trackio can't begin"):
        begin_trackers(["trackio"], job(tmp_path, "one"), 0)
    monkeypatch.setattr(broken, "Image", None, raising=False)
    monkeypatch.setattr(broken, "init", lambda *words, **options: object(), raising=False)  # a run without `log`
    told = begin_trackers(["tensorboard", "trackio"], job(tmp_path, "two"), 0)
    for step in (1, 2):
        told.numbers(step, {"loss": 1.0})
    assert caplog.text.count("trackio gets nothing more") == 1
    assert told
    told.close()
