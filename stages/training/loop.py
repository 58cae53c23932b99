"""The loop in which both trainers learn: read a batch, step, log, save, stop where nothing is lost.

A run that is interrupted anywhere and continued is the run that was not interrupted, to the bit, on a CPU with the
same number of threads and ranks: everything a step changes is in the checkpoint, and batches follow from their place.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from rae.stages.job import Job, Result
from rae.stages.models.payload import Payload
from rae.stages.models.pixels import to_uint8
from rae.stages.training.checkpoints import load, newest
from rae.stages.training.data import prefetch
from rae.stages.training.learner import B, NonFinite, Trainee
from rae.stages.training.metrics_log import Meter, MetricsLog
from rae.stages.training.online import Evaluation, OnlineScores
from rae.stages.training.optimizer import learning_rate, steps_per_epoch, total_steps
from rae.stages.training.profiling import profiled
from rae.stages.training.ranks import Ranks
from rae.stages.training.results import Results, check_milestones
from rae.stages.training.section import TrainingSection
from rae.stages.training.trackers import Trackers, begin_trackers
from rae.stages.training.watchdog import watched
from rae.store.errors import PartialResult

logger = logging.getLogger("rae.train")


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
    show: Callable[[B], Tensor] | None = None,
) -> Result:
    """Train to the end, from the newest checkpoint of this job's attempts or else the finished run's, `continued`.

    `batch(epoch, step)` makes this rank's share of a global batch, in up to `section.workers` threads at once: it
    reads and draws, and leaves arithmetic whose order of summation matters to the loss. Milestones are published before
    the checkpoint of their step is saved, so that no resume passes one by. Returns what was made, which `payload`
    describes, its last checkpoint included. Trackers get what `show` makes of a batch with each checkpoint, images
    [N, 3, S, S] in [0, 1]. Raises `PartialResult` or `Interrupted`, after saving, when the job is
    asked to stop; `ConfigError` for a milestone that lies where this training does not come by; `NonFinite` when more
    steps than `section.max_skipped_steps` have come to nothing.
    """
    per_epoch, total = steps_per_epoch(section, rows), total_steps(section, rows)
    done, meter, attempt = _resume(learner, job, ranks, continued)
    check_milestones(job.milestones, done, total)
    results = Results(learner, payload, meter, section, per_epoch, job, ranks)
    results.go_on_from(attempt, done)
    trackers = begin_trackers(section.trackers if ranks.is_main else (), job, done)
    log = MetricsLog(job.folder, done, attempt, trackers) if ranks.is_main else None
    online = OnlineScores(evaluation, results, log, job, ranks)
    online.catch_up(done)
    steps = range(done, total)
    with (
        closing(trackers),
        closing(prefetch(lambda step: batch(*divmod(step, per_epoch)), steps, section.workers)) as batches,
        watched(ranks, section.hang_report_s) as watchdog,
        profiled(job.observed, ranks, learner.device) as profile,
    ):
        mark = time.perf_counter()
        while done < total:
            watchdog.at(done + 1)
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
            profile.step(done)
            speed = {
                "images_per_s": meter.window.per_second(section.batch_size),
                "data_wait": meter.window.data_wait,
            }
            if ranks.is_main:
                job.progress(done, total, "steps", **_loss_of(numbers), **speed)
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
                _show(show, item, done, learner, trackers)
                ranks.barrier()
                job.check_stop()
            if stop:
                # Another rank was asked, and its `check_stop` has raised.
                raise PartialResult(f"training stopped at step {done} of {total}; its checkpoint is saved")
            watchdog.at(None)
            mark += online.catch_up(done)
    speed = {"images_per_s": meter.run.per_second(section.batch_size), "data_wait": meter.run.data_wait}
    return results.finished(done, speed)


def _loss_of(numbers: Mapping[str, float | Tensor]) -> dict[str, float]:
    return {"loss": float(numbers["loss"])} if numbers else {}


def _show(show: Callable[[B], Tensor] | None, batch: B, done: int, learner: Trainee[B], trackers: Trackers) -> None:
    # A model in shards would have to be gathered, and stay so until the next step.
    if show is None or not trackers or learner.section.parallel == "fsdp2":
        return
    with torch.no_grad(), learner.autocast():
        images = to_uint8(show(batch).float())
    trackers.images(done, "reconstructions", images)


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
