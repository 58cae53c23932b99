"""Optimizer steps of the official DiT recipe (AdamW, schedule, clipping, EMA), as our trainer takes them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from parity.dit import config_from_official
from parity.fixture import below, close, close_after_training, read
from parity.schedule import schedule_from_official
from rae.stages.models.dit import build_dit
from rae.stages.models.transport import create_transport
from rae.stages.training.learner import Learner
from rae.stages.training.ranks import Ranks
from rae.stages.training.section import TrainingSection


@dataclass(frozen=True)
class Batch:
    """Latents x [B, C, H, W], labels y [B], times t [B] and noise like x."""

    x: Tensor
    y: Tensor
    t: Tensor
    noise: Tensor
    keys: tuple[str, ...] = ()


def check_dit_training(path: Path) -> None:
    about, tensors = read(path)
    io, initial, official = below(tensors, "io/"), below(tensors, "init/"), json.loads(about["training"])
    steps, batch_size = io["x"].shape[:2]
    section = TrainingSection(
        steps=steps,
        batch_size=batch_size,
        betas=official["optimizer"]["betas"],
        weight_decay=official["optimizer"].get("weight_decay", 0.0),
        clip_grad=float(about.get("clip_grad", 0)),
        ema_decay=float(about["ema_decay"]),
        **schedule_from_official(official.get("scheduler"), official["optimizer"]["lr"], official["steps_per_epoch"]),
    )
    model, transport = build_dit(config_from_official(about["config"])), create_transport()
    model.load_state_dict(initial)

    def loss(forward: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses = transport.training_losses(forward, batch.x, batch.y, t=batch.t, noise=batch.noise)
        return losses.mean(), {}

    rows = official["steps_per_epoch"] * batch_size
    learner = Learner(model, loss, section, rows=rows, ranks=Ranks(), device=torch.device("cpu"))
    taken: dict[str, list[float]] = {"losses": [], "lrs": [], "grad_norms": []}
    for step, inputs in enumerate(zip(io["x"], io["y"], io["t"], io["noise"], strict=True)):
        numbers = learner.step(Batch(*inputs), step)
        taken["losses"].append(numbers["loss"])
        taken["lrs"].append(learner.optimizer.param_groups[0]["lr"])
        taken["grad_norms"].append(float(numbers["grad_norm"]))
    for name in ("losses", "grad_norms"):
        close(torch.tensor(taken[name]), io[name].float(), name)
    torch.testing.assert_close(torch.tensor(taken["lrs"]), io["lrs"].float(), atol=0, rtol=1e-6, msg="lrs")
    for group, prefix in (("model", "final/"), ("ema", "ema/")):
        close_after_training(learner.tensors()[group], below(tensors, prefix), initial)
