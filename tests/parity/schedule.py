"""The official learning rate schedule in our names."""

from collections.abc import Mapping
from typing import Any


def schedule_from_official(
    scheduler: Mapping[str, Any] | None, lr: float, steps_per_epoch: int = 1
) -> dict[str, float | str]:
    """What `TrainingSection` is told. Without `warmup_from_zero` the official warm-up holds the rate; none decays none.

    Officially lengths are given in steps or in epochs.
    """
    if not scheduler:
        return {"lr": lr, "schedule": "constant"}
    warmup = scheduler.get("warmup_steps", int(scheduler.get("warmup_epochs", 0) * steps_per_epoch))
    end = scheduler.get("decay_end_steps", int(scheduler.get("decay_end_epoch", 0) * steps_per_epoch))
    climbs, lr = scheduler.get("warmup_from_zero", False), scheduler.get("base_lr", lr)
    return {
        "lr": lr,
        "schedule": scheduler["type"],
        "final_lr": scheduler.get("final_lr", lr),
        "warmup_steps": warmup if climbs else 0,
        "decay_start_epoch": 0 if climbs else warmup / steps_per_epoch,
        "decay_end_epoch": max(warmup, end) / steps_per_epoch,
    }
