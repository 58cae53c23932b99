"""What a training writes: checkpoints, milestones, and in the end what its artifact holds.

Rank 0 writes alone, but for checkpoints of a model that lies in shards. All ranks call these methods at once.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from rae.stages.job import NOTHING, Job, Result
from rae.stages.models.payload import Payload
from rae.stages.models.power_ema import find_snapshots
from rae.stages.training.checkpoints import Groups, files_of, save
from rae.stages.training.ema import EMA, PowerEMAs
from rae.stages.training.metrics_log import Meter
from rae.stages.training.parallel import gathered
from rae.stages.training.ranks import Ranks
from rae.stages.training.section import TrainingSection
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
        self,
        learner: Trained,
        payload: Payload,
        meter: Meter,
        section: TrainingSection,
        per_epoch: int,
        job: Job,
        ranks: Ranks,
    ) -> None:
        self._learner, self._payload, self._meter = learner, payload, meter
        self._section, self._per_epoch, self._job, self._ranks = section, per_epoch, job, ranks
        self._last: tuple[int, Path] | None = None

    def checkpoint(self, done: int) -> Path:
        """Save a checkpoint after `done` steps, unless it is there; returns its folder."""
        if self._last is None or self._last[0] != done:
            state, keep = self._meter.to_json(), self._section.keep_checkpoints
            groups, describe = self._learner.tensors(), self._payload.describe
            folder = save(self._job.folder, done, groups, state, keep, describe, self._ranks)
            self._last = done, folder
        return self._last[1]

    def reached(self, done: int, total: int) -> None:
        """Keep what is to be kept of the weights after `done` steps of `total`: averages, a milestone."""
        if self._learner.power_emas is not None:
            self._learner.power_emas.save(self._job.folder, done, done == total, self._ranks)
        self._milestone(done)

    def go_on_from(self, attempt: Path | None, done: int) -> None:
        """Bring what the attempt that training goes on from kept of its first `done` steps; see to its milestone."""
        if self._learner.power_emas is not None and attempt is not None and self._ranks.is_main:
            self._learner.power_emas.take_over(self._job.folder, attempt, done)
        self._milestone(done)

    def _milestone(self, done: int) -> None:
        if done in self._job.milestones:
            self.publish(done)

    def publish(self, done: int, name: str | None = None) -> None:
        """Publish the weights after `done` steps where a run publishes at all; called NAME-`name`, too, if it is given.

        Called by all ranks.
        """
        if self._job.publish is not None:
            weights = self._weights()
            if self._ranks.is_main:
                self._job.publish(done, lambda folder: self._payload_of(done, folder, *weights), name)

    def model(self, done: int, folder: Path) -> None:
        """Write the weights after `done` steps, and what they are, into a folder. Called by all ranks."""
        weights = self._weights()
        if self._ranks.is_main:
            self._payload_of(done, folder, *weights)

    def finished(self, done: int, numbers: Mapping[str, float]) -> Result:
        """The payload of the whole training, with its last checkpoint and its log, all in this attempt.

        Files that payload and checkpoint have in common are stored once. `NOTHING` on ranks other than the first.
        """
        checkpoint, weights = self.checkpoint(done), self._weights()
        if not self._ranks.is_main:
            return NOTHING
        result = self._payload_of(done, self._job.folder, *weights, stored=checkpoint)
        kept = self._job.folder / "metrics.jsonl", *find_snapshots(self._job.folder)
        files = (*result.files, *kept, *files_of(checkpoint))
        return Result(result.content, {**result.metrics, **numbers}, files)

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model's and the average's, whole on rank 0."""
        model, ema = self._learner.model, self._learner.ema.model
        return gathered(model.state_dict(), self._ranks), gathered(ema.state_dict(), self._ranks)

    def _payload_of(
        self,
        done: int,
        folder: Path,
        model: Mapping[str, Tensor],
        ema: Mapping[str, Tensor],
        stored: Path | None = None,
    ) -> Result:
        files, content = self._payload.save(folder, model, ema, stored)
        parameters = sum(parameter.numel() for parameter in self._learner.model.parameters())
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
