"""The loop in which both trainers learn: read a batch, step, log, save, stop where nothing is lost.

A run that is interrupted anywhere and continued is the run that was not interrupted, to the bit, on a CPU with the
same number of threads and ranks: everything a step changes is in the checkpoint, and batches follow from their place.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from rae.stages.job import Job, Result
from rae.stages.models.payload import Payload
from rae.stages.training.checkpoints import Groups, load, newest
from rae.stages.training.data import prefetch
from rae.stages.training.ema import EMA, PowerEMAs
from rae.stages.training.metrics_log import Meter, MetricsLog
from rae.stages.training.online import Evaluation, OnlineScores
from rae.stages.training.optimizer import (
    build_optimizer,
    descend,
    learning_rate,
    load_optimizer,
    optimizer_tensors,
    steps_per_epoch,
    total_steps,
)
from rae.stages.training.parallel import agree, averaging, fill, spread
from rae.stages.training.ranks import Ranks
from rae.stages.training.results import Results, check_milestones
from rae.stages.training.sections import TrainingSection
from rae.store.errors import ConfigError, PartialResult, RaeError, StaleInput

logger = logging.getLogger("rae.train")


class Batch(Protocol):
    """One rank's share of a global batch: whatever the loss needs, and the names of its samples for messages."""

    @property
    def keys(self) -> Iterable[object]:
        """A name for each sample."""

    def split(self, parts: int) -> "Sequence[Self]":
        """The same samples in `parts` equal parts, in order."""


B = TypeVar("B", bound=Batch)
Loss = Callable[[nn.Module, B], tuple[Tensor, dict[str, Tensor]]]


class NonFinite(RaeError):
    """A loss or a gradient is not finite: the step came to nothing."""


class Trainee(ABC, Generic[B]):
    """A module in training with its optimizer, schedule and EMA: what `train` steps, saves and restores.

    `forward` is the module with gradients averaged over ranks; calling it rather than the module trains all alike.
    `power_emas` are averages to choose from afterwards, if there are to be any.
    """

    def __init__(
        self,
        model: nn.Module,
        section: TrainingSection,
        *,
        rows: int,
        ranks: Ranks,
        device: torch.device,
        power_emas: PowerEMAs | None = None,
    ) -> None:
        shares = ranks.world_size * section.grad_accum_steps
        if section.batch_size % shares:
            raise ConfigError(
                f"`batch_size` {section.batch_size} does not divide into `grad_accum_steps` {section.grad_accum_steps}"
                f" parts on each of {ranks.world_size} ranks"
            )
        self.model = agree(model.to(device).train(), ranks)
        self.section, self.ranks, self.device = section, ranks, device
        self.schedule = steps_per_epoch(section, rows), total_steps(section, rows)
        self.ema, self.power_emas = EMA(self.model, section.ema_decay), power_emas
        averages = [self.ema.model, *(power_emas.models if power_emas is not None else ())]
        self.forward = spread(self.model, section.parallel, ranks, device, averages)
        self.optimizer = build_optimizer(self.model, section)

    @abstractmethod
    def step(self, batch: B, step: int) -> dict[str, float | Tensor]:
        """Learn from one batch; `step` counts from 0. Returns the numbers to log, the same ones in every step.

        One of them is `loss`. Raises `NonFinite`, on every rank, if a loss or the gradients' norm is not finite on some
        rank: weights, EMA and the optimizer's state are then as they were.
        """

    def autocast(self) -> torch.autocast:
        """The section's precision, for the forward pass and the losses."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.section.precision == "bf16")

    def parts(self, batch: B) -> Sequence[B]:
        """What goes through the model at once, one part after another: `grad_accum_steps` parts of a batch."""
        return [batch] if self.section.grad_accum_steps == 1 else batch.split(self.section.grad_accum_steps)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        return learning_rate(self.section, step, *self.schedule)

    def check_norm(self, name: str, batch: B, step: int) -> Callable[[float], None]:
        """Raises `NonFinite` for a norm that is not finite."""

        def check(norm: float) -> None:
            if not math.isfinite(norm):  # on all ranks at once: gradients are the global batch's
                finite(name, norm, batch, step, self.ranks)

        return check

    def tensors(self) -> Groups:
        """What a checkpoint must hold to continue."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.model),
            **(self.power_emas.tensors() if self.power_emas is not None else {}),
        }

    def restore(self, tensors: Groups) -> None:
        """Take over what `tensors` gave; `StaleInput` if that is of another model."""
        try:
            self._take_over(tensors)
        except (KeyError, RuntimeError) as error:
            raise StaleInput(f"the checkpoint is of another model ({error})") from error

    def _take_over(self, tensors: Groups) -> None:
        fill(self.model, tensors["model"])
        fill(self.ema.model, tensors["ema"])
        load_optimizer(self.optimizer, self.model, tensors["optimizer"])
        if self.power_emas is not None:
            self.power_emas.restore(tensors)


class Learner(Trainee[B]):
    """A module that descends one loss.

    `loss(forward, batch)` gives the mean loss of the batch, 0-dim, and further numbers to log.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss[B],
        section: TrainingSection,
        *,
        rows: int,
        ranks: Ranks,
        device: torch.device,
        power_emas: PowerEMAs | None = None,
    ) -> None:
        super().__init__(model, section, rows=rows, ranks=ranks, device=device, power_emas=power_emas)
        self.loss = loss
        if section.compile:
            self.forward.compile()

    def step(self, batch: B, step: int) -> dict[str, float | Tensor]:
        """Descend the loss of one batch; as of every `Trainee`."""
        self.optimizer.zero_grad()
        parts, failures = self.parts(batch), list[NonFinite]()
        numbers = [self._learn(part, step, len(parts), part is parts[-1], failures) for part in parts]
        if failures:
            raise failures[0]
        check = self.check_norm("grad_norm", batch, step)
        norm = descend(self.optimizer, self.model, self.rate(step), self.section.clip_grad, check)
        self.ema.update(self.model)
        if self.power_emas is not None:
            self.power_emas.update(self.model, step + 1)
        return {**mean_numbers(numbers), "grad_norm": norm}

    def _learn(
        self, part: B, step: int, parts: int, last: bool, failures: list[NonFinite]
    ) -> dict[str, float | Tensor]:
        """Add the gradient of one of a batch's `parts`; returns its numbers, and notes that they are not finite.

        It goes backwards all the same: what shards have added up of earlier parts, only the last pass takes from them.
        """
        with averaging(self.forward, last):
            with self.autocast():
                loss, made_of = self.loss(self.forward, part)
            numbers = {name: number.detach() for name, number in made_of.items()}
            # Read before the backward pass is queued: here a GPU waits for its next command only.
            value = loss.item()
            try:
                finite("loss", value, part, step, self.ranks, numbers)
            except NonFinite as failure:
                failures.append(failure)
            (loss / parts).backward()  # type: ignore[no-untyped-call]
        return {"loss": value, **numbers}


def mean_numbers(parts: Sequence[Mapping[str, float | Tensor]]) -> dict[str, float | Tensor]:
    """The numbers of a batch from those of its equal parts."""
    first, *others = parts
    if not others:
        return dict(first)
    return {name: sum((part[name] for part in others), first[name]) / len(parts) for name in first}


def finite(
    what: str, value: float, batch: Batch, step: int, ranks: Ranks, parts: Mapping[str, float | Tensor] | None = None
) -> float:
    """`value`; if it is not finite on some rank, `NonFinite` on every rank, with the samples in question.

    `parts` are what the value is made of; several of them are named with it.
    """
    if ranks.any(not math.isfinite(value)):
        mine: tuple[str, list[str]] | None = None
        if not math.isfinite(value):
            made_of = ", ".join(f"{name} {float(part):.4g}" for name, part in (parts or {}).items())
            named = f" ({made_of})" if len(parts or {}) > 1 else ""
            mine = f"{value}{named}", [str(key) for key in batch.keys]
        reports = [report for report in ranks.gather(mine) if report is not None]
        keys = [key for _, suspects in reports for key in suspects]
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        reported = f"the {what} became {reports[0][0]} at step {step + 1}"
        raise NonFinite(f"{reported}, on samples {', '.join(keys[:8])}{more}")
    return value


def train(
    learner: Trainee[B],
    batch: Callable[[int, int], B],
    section: TrainingSection,
    payload: Payload,
    *,
    rows: int,
    job: Job,
    ranks: Ranks,
    continued: Path | None = None,
    evaluation: Evaluation | None = None,
) -> Result:
    """Train to the end, from the newest checkpoint of this job's attempts or else the finished run's, `continued`.

    `batch(epoch, step)` makes this rank's share of a global batch, in up to `section.workers` threads at once: it
    reads and draws, and leaves arithmetic whose order of summation matters to the loss. Milestones are published before
    the checkpoint of their step is saved, so that no resume passes one by. Returns what was made, which `payload`
    describes, its last checkpoint included. Raises `PartialResult` or `Interrupted`, after saving, when the job is
    asked to stop; `ConfigError` for a milestone that lies where this training does not come by; `NonFinite` when more
    steps than `section.max_skipped_steps` have come to nothing.
    """
    per_epoch, total = steps_per_epoch(section, rows), total_steps(section, rows)
    done, meter, attempt = _resume(learner, job, ranks, continued)
    check_milestones(job.milestones, done, total)
    results = Results(learner, payload, meter, section, per_epoch, job, ranks)
    results.go_on_from(attempt, done)
    log = MetricsLog(job.folder, done, attempt) if ranks.is_main else None
    online = OnlineScores(evaluation, results, log, job, ranks)
    online.catch_up(done)
    steps = range(done, total)
    with closing(prefetch(lambda step: batch(*divmod(step, per_epoch)), steps, section.workers)) as batches:
        mark = time.perf_counter()
        while done < total:
            asked = time.perf_counter()
            item = next(batches)
            data_wait = time.perf_counter() - asked
            numbers: dict[str, float | Tensor] = {}
            try:
                numbers = learner.step(item, done)
            except NonFinite as error:
                _skip(error, done + 1, meter, section.max_skipped_steps, log)
            done, now = done + 1, time.perf_counter()
            meter.add(numbers, now - mark, data_wait)
            mark = now
            speed = {
                "images_per_s": meter.window.per_second(section.batch_size),
                "data_wait": meter.window.data_wait,
            }
            if ranks.is_main:
                loss = {"loss": float(numbers["loss"])} if numbers else {}
                job.progress(done, total, "steps", **loss, **speed)
            if done % section.log_every == 0 or done == total:
                meter.sums = _mean(meter.sums, ranks)
                meter.close_window()
                rate = learning_rate(section, done - 1, per_epoch, total)
                if log:
                    log.log(step=done, epoch=done / per_epoch, **meter.latest, lr=rate, **speed)
            stop = ranks.any(job.stopping())
            saves = stop or online.is_due(done) or done % section.checkpoint_every == 0 or done == total
            results.reached(done, total)
            if saves:
                meter.sums = _mean(meter.sums, ranks)
                results.checkpoint(done)
                ranks.barrier()
                job.check_stop()
            if stop:
                # Another rank was asked, and its `check_stop` has raised.
                raise PartialResult(f"training stopped at step {done} of {total}; its checkpoint is saved")
            mark += online.catch_up(done)
    speed = {"images_per_s": meter.run.per_second(section.batch_size), "data_wait": meter.run.data_wait}
    return results.finished(done, speed)


def _skip(error: NonFinite, step: int, meter: Meter, limit: int, log: MetricsLog | None) -> None:
    """Count a step, from 1, that came to nothing, and say so; beyond the limit that is the end."""
    earlier = meter.skipped
    if len(earlier) == limit:
        listed = ", ".join(map(str, earlier))
        told = f"; `max_skipped_steps` is {limit}, and as many came to nothing before: {listed}" if limit else ""
        raise NonFinite(error.message + told) from error
    meter.skipped = [*earlier, step]
    if log:
        logger.warning("skipped a step, %d of at most %d: %s", len(meter.skipped), limit, error.message)
        log.log(step=step, skipped_steps=len(meter.skipped), skipped=error.message)


def _resume(learner: Trainee[B], job: Job, ranks: Ranks, continued: Path | None) -> tuple[int, Meter, Path | None]:
    """Restore the newest valid checkpoint, chosen by rank 0, or that of the finished run that is continued.

    Returns the steps done, the meter, and the attempt that saved it.
    """
    checkpoint = newest((job.folder, *job.earlier)) if ranks.is_main else None
    if checkpoint is None and continued is not None and ranks.is_main:
        checkpoint = load(continued)
    folder = ranks.broadcast(checkpoint.folder if checkpoint else None)
    if folder is None:
        return 0, Meter(), None
    checkpoint = checkpoint or load(folder)
    learner.restore(checkpoint.tensors)
    logger.info("continued from step %d (%s)", checkpoint.step, folder)
    return checkpoint.step, Meter.from_json(checkpoint.state), checkpoint.attempt


def _mean(sums: dict[str, float | Tensor], ranks: Ranks) -> dict[str, float | Tensor]:
    """The sums averaged over ranks; alone they stay where they are."""
    if ranks.world_size == 1 or not sums:
        return sums
    values = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64)
    return dict(zip(sums, ranks.all_reduce_mean(values).tolist(), strict=True))
