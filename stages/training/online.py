"""Scores of a model in training, taken while it trains by what takes them afterwards."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rae.stages.job import Job
from rae.stages.training.metrics_log import MetricsLog, read
from rae.stages.training.ranks import Ranks

BEST = "frechet_distance"
_WEIGHTS: tuple[Literal["ema", "model"], ...] = ("ema", "model")


@dataclass(frozen=True)
class Evaluation:
    """What to do every `every` steps: `score` the model in a folder with the weights named, all ranks together.

    `score` works in the folder of the job that it is given, and returns its numbers to rank 0. With `keep_best` the
    step whose EMA has the least Fréchet distance so far is published. `images` are some of those that `score` drew in a
    folder, uint8 [N, S, S, 3].
    """

    every: int
    score: Callable[[Path, Literal["ema", "model"], Job], Mapping[str, float]]
    keep_best: bool = False
    images: Callable[[Path], NDArray[np.uint8]] | None = None


class Models(Protocol):
    """Who writes the model that is trained, with all ranks."""

    def model(self, done: int, folder: Path) -> object:
        """Write it as it is after `done` steps."""

    def publish(self, done: int, name: str) -> None:
        """Publish it, called NAME-`name` too."""


class OnlineScores:
    """Scores in the log, a line a step, as `ema_METRIC` and `model_METRIC`; none without an `evaluation`."""

    def __init__(
        self, evaluation: Evaluation | None, models: Models, log: MetricsLog | None, job: Job, ranks: Ranks
    ) -> None:
        self._evaluation, self._models, self._log, self._job, self._ranks = evaluation, models, log, job, ranks
        lines = read(log.path) if log is not None else []
        self._scored = {line["step"]: line.get(f"ema_{BEST}") for line in lines if f"ema_{BEST}" in line}

    def is_due(self, done: int) -> bool:
        """Whether the model is scored after `done` steps."""
        return self._evaluation is not None and done > 0 and done % self._evaluation.every == 0

    def catch_up(self, done: int) -> float:
        """Score the model after `done` steps if that is due and not in the log; called by all ranks. Returns seconds.

        May raise what stops the job: then the checkpoint of this step, which must be there, leads here again.
        """
        began, evaluation = time.perf_counter(), self._evaluation
        if evaluation is None or not self.is_due(done) or self._ranks.broadcast(done in self._scored):
            return 0.0
        folder = self._job.folder / "online"
        if self._ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "model").mkdir(parents=True)
        self._models.model(done, folder / "model")
        self._ranks.barrier()
        numbers = {
            f"{weights}_{name}": value
            for weights in _WEIGHTS
            for name, value in evaluation.score(folder / "model", weights, self._inner(folder / weights)).items()
        }
        if self._ranks.broadcast(evaluation.keep_best and self._is_best(numbers.get(f"ema_{BEST}"))):
            self._models.publish(done, "best")
        if self._log is not None:
            self._log.log(step=done, **numbers)
            if self._log.trackers and evaluation.images is not None:
                self._log.trackers.images(done, "samples", evaluation.images(folder / "ema"))
            self._scored[done] = numbers[f"ema_{BEST}"]
            shutil.rmtree(folder, ignore_errors=True)
        return time.perf_counter() - began

    def _inner(self, folder: Path) -> Job:
        job = self._job
        return Job(folder, progress=job.progress, stopping=job.stopping, check_stop=job.check_stop, device=job.device)

    def _is_best(self, score: float | None) -> bool:
        return score is not None and all(score < other for other in self._scored.values() if other is not None)
