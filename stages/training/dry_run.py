"""A training that is built and ready: to be run, or to be tried out first, so that what fails does so now."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from rae.stages.job import Job, Result
from rae.stages.models.payload import Payload
from rae.stages.peak_memory import peak_memory_bytes
from rae.stages.training.learner import Batch, Trainee
from rae.stages.training.loop import train
from rae.stages.training.online import Evaluation
from rae.stages.training.optimizer import steps_per_epoch, total_steps
from rae.stages.training.ranks import Ranks
from rae.stages.training.section import TrainingSection
from rae.store.errors import ConfigError
from rae.store.manifest import Json

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class Training(Generic[B]):
    """What `train` is given; and, to be counted, the `networks` of its losses, frozen but for a discriminator's heads.

    Every loss has begun by step `every_loss`, counted from 0. `show` makes images of a batch to look at.
    """

    learner: Trainee[B]
    batch: Callable[[int, int], B]
    section: TrainingSection
    payload: Payload
    rows: int
    ranks: Ranks
    networks: Sequence[nn.Module] = ()
    every_loss: int = 0
    show: Callable[[B], torch.Tensor] | None = None

    def run(self, job: Job, continued: Path | None, evaluation: Evaluation | None = None) -> Result:
        """Train to the end; as `train`."""
        given = self.learner, self.batch, self.section, self.payload
        how: dict[str, Any] = {"continued": continued, "evaluation": evaluation, "show": self.show}
        return train(*given, rows=self.rows, job=job, ranks=self.ranks, **how)

    def dry_run(self) -> Json:
        """Take two steps of the final phase, with every loss; returns what they took and what a whole run would.

        The second is measured: the first makes the optimizer's state and compiles. Of several ranks, the slowest and
        the largest count. `peak_memory_bytes` is CUDA's allocator's; elsewhere the process's resident set, the
        interpreter and its libraries included. Raises `ConfigError` if a GPU's memory does not suffice, and what a
        step of training raises.
        """
        section, device = self.section, self.learner.device
        per_epoch, total = steps_per_epoch(section, self.rows), total_steps(section, self.rows)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        first = max(total - 1, self.every_loss)
        data_seconds = step_seconds = 0.0
        for step in (first, first + 1):
            began = time.perf_counter()
            batch = self.batch(*divmod(step, per_epoch))
            ready = time.perf_counter()
            numbers = self._step(batch, step)
            data_seconds, step_seconds = ready - began, time.perf_counter() - ready
        taken = self.ranks.gather((data_seconds, step_seconds, _peak_memory(device)))
        data_seconds, step_seconds, peak = (max(values) for values in zip(*taken, strict=True))
        hidden = max(step_seconds, data_seconds / section.workers) if section.workers else step_seconds + data_seconds
        groups = self.learner.tensors().values()
        return {
            "device": str(device),
            "processes": self.ranks.world_size,
            "parameters": self._parameters(),
            "peak_memory_bytes": peak,
            "memory_bytes": _memory(device),
            "batch_size": section.batch_size,
            "seconds_per_step": step_seconds,
            "seconds_per_batch": data_seconds,
            "workers": section.workers,
            "steps": total,
            "seconds": total * hidden,
            "checkpoint_bytes": sum(tensor.nbytes for group in groups for tensor in group.values()),
            "numbers": {name: float(number) for name, number in numbers.items()},
        }

    def _step(self, batch: B, step: int) -> dict[str, float | torch.Tensor]:
        device = self.learner.device
        try:
            numbers = self.learner.step(batch, step)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"a step with `batch_size` {self.section.batch_size} on {self.ranks.world_size} process(es) does not"
                f" fit the memory of {device}: use more processes, or set `grad_accum_steps`, `grad_checkpoint` or"
                " `precision: bf16`"
            ) from error
        return numbers

    def _parameters(self) -> dict[str, int]:
        """How many learn in the model and in a discriminator's heads, and how many others are in memory, EMA apart."""
        counts, seen = {"trained": 0, "discriminator": 0, "frozen": 0}, set[nn.Parameter]()
        for learns, network in (("trained", self.learner.model), *(("discriminator", one) for one in self.networks)):
            for parameter in set(network.parameters()) - seen:  # the encoder may serve several losses
                counts[learns if parameter.requires_grad else "frozen"] += parameter.numel()
                seen.add(parameter)
        return counts


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes()


def _memory(device: torch.device) -> int:
    """All there is."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
