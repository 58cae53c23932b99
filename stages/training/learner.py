"""What a training steps, saves and restores: a module with its optimizer, schedule and averages."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from rae.stages.training.checkpoints import Groups
from rae.stages.training.ema import EMA, PowerEMAs
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
from rae.stages.training.section import TrainingSection
from rae.store.errors import ConfigError, RaeError, StaleInput


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
