"""Averages of the weights: the exponential one is published; power-function ones are kept for a choice afterwards."""

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rae.stages.models.power_ema import FOLDER, decay, exponent, find_snapshots, save_snapshot
from rae.stages.training.parallel import fill, gathered
from rae.stages.training.ranks import ALONE, Ranks


class EMA:
    """`model` follows the trained one: ema <- decay * ema + (1 - decay) * weight after every step.

    It starts as a copy, in eval mode and without gradients. Buffers (tables, counters) are copied, not averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move one step towards `model`, which has the same parameters and buffers."""
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
        for copied, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            copied.copy_(buffer)


class PowerEMAs:
    """Averages of several lengths `sigma_rel` (`rae.stages.models.power_ema`), with a snapshot every so many steps.

    Each is one more copy of the weights in memory, and in every snapshot.
    """

    def __init__(self, model: nn.Module, sigma_rels: Sequence[float], snapshot_every: int) -> None:
        self._averages = {sigma_rel: EMA(model, 0.0) for sigma_rel in sigma_rels}
        self._snapshot_every = snapshot_every

    @property
    def models(self) -> list[nn.Module]:
        """The averages."""
        return [average.model for average in self._averages.values()]

    def update(self, model: nn.Module, step: int) -> None:
        """Move towards `model` as it is after step `step`, counted from 1."""
        for sigma_rel, average in self._averages.items():
            average.decay = decay(step, exponent(sigma_rel))
            average.update(model)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint must hold to continue."""
        averages = enumerate(self._averages.values())
        return {f"power_ema_{number}": average.model.state_dict() for number, average in averages}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `tensors` gave."""
        for number, average in enumerate(self._averages.values()):
            fill(average.model, tensors[f"power_ema_{number}"])

    def save(self, attempt: Path, step: int, last: bool, ranks: Ranks = ALONE) -> None:
        """Write a snapshot, if one is due after `step` steps or these are the last. All ranks call it at once."""
        if last or step % self._snapshot_every == 0:
            for sigma_rel, average in self._averages.items():
                weights = gathered(dict(average.model.named_parameters()), ranks)
                if ranks.is_main:
                    save_snapshot(attempt, step, sigma_rel, weights)

    def take_over(self, attempt: Path, earlier: Path, step: int) -> None:
        """Bring the snapshots up to `step` from the attempt that training goes on from; they are never changed."""
        (attempt / FOLDER).mkdir(exist_ok=True)
        for path, (at, _) in find_snapshots(earlier).items():
            target = attempt / FOLDER / path.name
            # Not the last one of a run that is continued, unless one is due there.
            if at <= step and at % self._snapshot_every == 0 and not target.exists():
                try:
                    os.link(path, target)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(path, target)
