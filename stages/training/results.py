"""What a training writes: checkpoints, milestones, and in the end what its artifact holds. Rank 0 writes alone."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from torch import nn

from rae.stages.job import Job, Result
from rae.stages.models.payload import Payload
from rae.stages.models.power_ema import find_snapshots
from rae.stages.training.checkpoints import Groups, files_of, save
from rae.stages.training.ema import EMA, PowerEMAs
from rae.stages.training.metrics_log import Meter
from rae.stages.training.sections import TrainingSection
from rae.store.errors import ConfigError


class Trained(Protocol):
    """What is written of a `Trainee`."""

    model: nn.Module
    ema: EMA
    power_emas: PowerEMAs | None

    def tensors(self) -> Groups:
        """What a checkpoint must hold to continue."""


class Results:
    """Writes what `payload` describes, with the weights of `learner` and the numbers of `meter` at a step."""

    def __init__(
        self, learner: Trained, payload: Payload, meter: Meter, section: TrainingSection, per_epoch: int, job: Job
    ) -> None:
        self._learner, self._payload, self._meter = learner, payload, meter
        self._section, self._per_epoch, self._job = section, per_epoch, job
        self._last: tuple[int, Path] | None = None

    def checkpoint(self, done: int) -> Path:
        """Save a checkpoint after `done` steps, unless it is there; returns its folder."""
        if self._last is None or self._last[0] != done:
            state, keep = self._meter.to_json(), self._section.keep_checkpoints
            folder = save(self._job.folder, done, self._learner.tensors(), state, keep, self._payload.describe)
            self._last = done, folder
        return self._last[1]

    def milestone(self, done: int) -> None:
        """Publish the weights after `done` steps, if they are to be."""
        if self._job.publish is not None and done in self._job.milestones:
            self._job.publish(done, lambda folder: self._payload_of(done, folder))

    def snapshot(self, done: int, total: int) -> None:
        """Keep the averages whose length is chosen later, where a snapshot of them is due."""
        if self._learner.power_emas is not None:
            self._learner.power_emas.save(self._job.folder, done, last=done == total)

    def take_over(self, attempt: Path | None, done: int) -> None:
        """Bring what the attempt that training goes on from has kept of its first `done` steps."""
        if self._learner.power_emas is not None and attempt is not None:
            self._learner.power_emas.take_over(self._job.folder, attempt, done)

    def finished(self, done: int, numbers: Mapping[str, float]) -> Result:
        """The payload of the whole training, with its last checkpoint and its log, all in this attempt."""
        result = self._payload_of(done, self._job.folder)
        kept = self._job.folder / "metrics.jsonl", *find_snapshots(self._job.folder)
        files = (*result.files, *kept, *files_of(self.checkpoint(done)))
        return Result(result.content, {**result.metrics, **numbers}, files)

    def _payload_of(self, done: int, folder: Path) -> Result:
        model, ema = self._learner.model, self._learner.ema.model
        files, content = self._payload.save(folder, model.state_dict(), ema.state_dict())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        numbers = {"steps": done, "epochs": done / self._per_epoch, **self._meter.latest}
        if self._meter.skipped:
            numbers["skipped_steps"] = len(self._meter.skipped)
        metrics = {"parameters": parameters, **self._payload.metrics, **numbers, "seconds": self._meter.run.seconds}
        return Result(content, metrics, files)


def check_milestones(milestones: Iterable[int], done: int, total: int) -> None:
    """Refuse milestones that a training from step `done` to `total` does not come by: now, not when it has ended."""
    for step in sorted(milestones):
        if step > total:
            raise ConfigError(f"`publish_at` asks for step {step}, and training ends with step {total}")
        if step < done:
            raise ConfigError(
                f"step {step} can't be published any more: training goes on from step {done}; take it out of"
                " `publish_at`, or begin anew with --restart"
            )
