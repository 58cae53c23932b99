"""Twenty steps of the official DiT recipe (AdamW, linear schedule, clipping, EMA), as our trainers take them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.transport import create_transport
from rae.stages.sections import TrainingSection
from rae.stages.training.loop import Learner
from rae.stages.training.ranks import Ranks

FIXTURE = Path(__file__).parents[2] / "parity" / "dit_training.safetensors"
IMPLIED = ("use_swiglu", "use_rope", "use_rmsnorm", "use_pos_embed", "wo_shift")  # no choice in our configuration


@dataclass
class Step:
    x: Tensor
    y: Tensor
    t: Tensor
    noise: Tensor
    keys: tuple[str, ...] = ()


def test_a_learner_takes_the_official_steps():
    with safe_open(FIXTURE, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    given = {key.removeprefix("io/"): tensor for key, tensor in tensors.items() if key.startswith("io/")}
    official = json.loads(metadata["training"])
    rate = official["scheduler"]
    section = TrainingSection(
        epochs=5,
        batch_size=4,
        lr=rate["base_lr"],
        betas=official["optimizer"]["betas"],
        weight_decay=official["optimizer"]["weight_decay"],
        schedule=rate["type"],
        decay_start_epoch=rate["warmup_epochs"],  # without a warm-up from zero theirs is a hold
        decay_end_epoch=rate["decay_end_epoch"],
        final_lr=rate["final_lr"],
        clip_grad=float(metadata["clip_grad"]),
        ema_decay=float(metadata["ema_decay"]),
    )
    config = {key: value for key, value in json.loads(metadata["config"]).items() if key not in IMPLIED}
    model = build_dit(DiTConfig.from_dict({"model": "DiT-DH", **config}))
    initial = {key.removeprefix("init/"): tensor for key, tensor in tensors.items() if key.startswith("init/")}
    model.load_state_dict(initial)
    transport = create_transport()

    def loss(forward, batch):
        return transport.training_losses(forward, batch.x, batch.y, t=batch.t, noise=batch.noise).mean(), {}

    rows = official["steps_per_epoch"] * section.batch_size
    learner = Learner(model, loss, section, rows=rows, ranks=Ranks(), device=torch.device("cpu"))
    inputs = zip(*(given[name] for name in ("x", "y", "t", "noise")), strict=True)
    for step, (x, y, t, noise) in enumerate(inputs):
        numbers = learner.step(Step(x, y, t, noise), step)
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(given["lrs"][step].item(), rel=1e-12)
        assert numbers["loss"] == pytest.approx(given["losses"][step].item(), rel=1e-4)
        assert numbers["grad_norm"].item() == pytest.approx(given["grad_norms"][step].item(), rel=1e-4)
    for group, prefix in (("model", "final/"), ("ema", "ema/")):
        for key, weight in learner.tensors()[group].items():
            travelled = (tensors[prefix + key] - initial[key]).norm()
            assert (weight - tensors[prefix + key]).norm() <= 1e-3 * travelled + 1e-6, key
