"""Samplers of the probability-flow ODE, and guidance.

From noise at t = 1 towards data at t = 0 on the transport's shifted grid; see `Transport.sampling_times`.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from rae.stages.models.transport import Model, Transport
from rae.store.errors import ConfigError

SamplerName = Literal["euler", "heun"]


@torch.no_grad()
def sample_ode(
    model: Model,
    noise: Tensor,
    y: Tensor,
    *,
    transport: Transport,
    sampler: str = "euler",
    num_steps: int = 50,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    null_label: int,
    guide: Model | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents from noise: [B, C, H, W] -> the same shape, dtype and device.

    Args:
        model: `model(x, t, y)`; its output is what `transport` says.
        noise: standard normal [B, C, H, W].
        y: labels [B].
        transport: path, prediction and time shift that the model was trained with.
        sampler: `euler`, or `heun`: second order, two evaluations a step.
        num_steps: points of the time grid, one more than there are steps (the official meaning), at least 2.
        guidance_scale, guidance_interval, null_label, guide: see `guided`.
        progress: told (steps done, steps to do) after each step.

    Raises:
        ConfigError: an unknown sampler, an empty grid or interval, or guidance that this model cannot give.
    """
    if sampler not in get_args(SamplerName):
        raise ConfigError(f"`sampler` is {sampler!r}; it must be one of {', '.join(get_args(SamplerName))}")
    if num_steps < 2:
        raise ConfigError(f"`num_steps` is {num_steps}; a grid needs 2 points or more")
    refuse_impossible_guidance(model, guidance_scale, guidance_interval, guide)

    def drift(x: Tensor, time: Tensor) -> Tensor:
        output = guided(model, x, time, y, guidance_scale, guidance_interval, null_label, guide)
        return transport.velocity(output.to(x.dtype), x, time.to(x).expand(x.shape[0]))

    x = noise
    times = transport.sampling_times(num_steps)  # on the CPU, so that the interval is decided without waiting
    for step, (time, following) in enumerate(pairwise(times), start=1):
        size = (following - time).item()
        slope = drift(x, time)
        if sampler == "heun":
            slope = (slope + drift(x + size * slope, following)) / 2
        x = x + size * slope
        if progress is not None:
            progress(step, num_steps - 1)
    return x


def guided(
    model: Model,
    x: Tensor,
    time: Tensor,
    y: Tensor,
    scale: float,
    interval: tuple[float, float],
    null_label: int,
    guide: Model | None,
) -> Tensor:
    """The model's output at one time, pushed away from a weaker prediction: weak + scale (output - weak).

    The weaker prediction is the guide's at the same x, t and y (autoguidance, Karras et al., 2024) or, without a guide,
    the model's own with every label `null_label` (classifier-free guidance, Ho and Salimans, 2022). It is computed only
    where it counts: at scales other than 1 and times in the closed interval (Kynkaanniemi et al., 2024), which is in
    shifted time, 0 being data. `time` is a scalar tensor on the CPU.
    """
    t = time.to(x).expand(x.shape[0])
    output = model(x, t, y)
    low, high = interval
    if scale == 1.0 or not bool((time >= low) & (time <= high)):
        return output
    weak = guide(x, t, y) if guide is not None else model(x, t, torch.full_like(y, null_label))
    return weak + scale * (output - weak)


def refuse_impossible_guidance(model: Model, scale: float, interval: tuple[float, float], guide: Model | None) -> None:
    """Raise `ConfigError` for an empty interval, and for classifier-free guidance of a model that always had labels."""
    if interval[0] >= interval[1]:
        raise ConfigError(f"`guidance_interval` {list(interval)} is empty; it is [least time, greatest time]")
    config = getattr(model, "config", None)
    if scale == 1.0 or guide is not None or config is None:
        return
    if config.num_classes == 0:
        raise ConfigError("An unconditional model has no labels to guide by; set `guidance_scale` to 1 or give a guide")
    if not config.has_null_label:
        raise ConfigError(
            "This model was trained with `class_dropout_prob` 0 and has no prediction without a label; set"
            " `guidance_scale` to 1 or give a guide"
        )
