"""Samplers of the probability-flow ODE, and guidance. `sde.py` has the stochastic one.

From noise at t = 1 towards data at t = 0, in shifted time; see `Transport.sampling_times`.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor
from torchdiffeq import odeint

from rae.stages.models.transport import Model, Transport, named
from rae.store.errors import ConfigError

OdeSampler = Literal["euler", "heun", "adaptive"]
Progress = Callable[[int, int], None]
Drift = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def sample_ode(
    model: Model,
    noise: Tensor,
    y: Tensor,
    *,
    transport: Transport,
    sampler: str = "euler",
    num_steps: int = 50,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    null_label: float,
    guide: Model | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Latents from noise: [B, C, H, W] -> the same shape, dtype and device.

    Args:
        model: `model(x, t, y)`; its output is what `transport` says.
        noise: standard normal [B, C, H, W].
        y: labels [B].
        transport: path, prediction and time shift that the model was trained with.
        sampler: `euler`; `heun`: second order, two evaluations a step; `adaptive`: Dormand-Prince 5(4), each image
            integrated alone, so that its steps and its rounding are its own.
        num_steps: points of the time grid, one more than there are steps (the official meaning), at least 2; the
            adaptive sampler chooses its own.
        atol, rtol: a step of the adaptive sampler is taken if the root mean square of its error over
            atol + rtol |x| is at most 1.
        guidance_scale, guidance_interval, null_label, guide: see `guided`.
        progress: told (steps done, steps to do) after each step; of the adaptive sampler, images.

    Raises:
        ConfigError: an unknown sampler, an empty grid or interval, guidance that this model cannot give, or tolerances
            that no step meets.
    """
    named("sampler", sampler, get_args(OdeSampler))
    if num_steps < 2:
        raise ConfigError(f"`num_steps` is {num_steps}; a grid needs 2 points or more")
    refuse_impossible_guidance(model, guidance_scale, guidance_interval, guide)

    def drift(x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        output = guided(model, x, time, y, guidance_scale, guidance_interval, null_label, guide)
        return transport.velocity(output, x, time.to(x).expand(x.shape[0]))

    if sampler == "adaptive":
        bounds = guidance_interval if guidance_scale != 1.0 else ()
        return _adaptive(drift, noise, y, transport.sampling_times(2), bounds, atol, rtol, progress)
    x = noise
    times = transport.sampling_times(num_steps)  # on the CPU, so that the interval is decided without waiting
    for step, (time, following) in enumerate(pairwise(times), start=1):
        size = (following - time).item()
        slope = drift(x, time, y)
        if sampler == "heun":
            slope = (slope + drift(x + size * slope, following, y)) / 2
        x = x + size * slope
        if progress is not None:
            progress(step, num_steps - 1)
    return x


def _adaptive(
    drift: Drift,
    noise: Tensor,
    y: Tensor,
    span: Tensor,
    jumps: tuple[float, ...],
    atol: float,
    rtol: float,
    progress: Progress | None,
) -> Tensor:
    """Integrate each row alone over `span` = (start, end); the drift may jump at the times `jumps`."""
    span = span.to(noise.device, torch.float64)
    start, end = span.tolist()
    options = {
        # A step lands on the end: the model is not asked beyond it, where its prediction may mean nothing.
        "step_t": span[1:],
        "jump_t": span.new_tensor([jump for jump in jumps if end < jump < start]),
        "first_step": (start - end) / 100,  # the solver's own guess asks the model at a time without bounds
    }
    rows = []
    for row in range(len(noise)):

        def alone(time: Tensor, x: Tensor, label: Tensor = y[row : row + 1]) -> Tensor:
            return drift(x, time, label)

        own = noise[row : row + 1].clone()  # in memory of its own: kernels may round by how it is aligned
        try:
            states = odeint(alone, own, span, rtol=rtol, atol=atol, method="dopri5", options=options)
        except AssertionError as error:
            raise ConfigError(
                f"no step of the adaptive sampler, however small, meets `rtol` {rtol} and `atol` {atol} ({error});"
                " loosen them, unless the transformer's output is not finite"
            ) from error
        rows.append(states[-1])
        if progress is not None:
            progress(len(rows), len(noise))
    return torch.cat(rows)


def guided(
    model: Model,
    x: Tensor,
    time: Tensor,
    y: Tensor,
    scale: float,
    interval: tuple[float, float],
    null_label: float,
    guide: Model | None,
) -> Tensor:
    """The model's output at one time, pushed away from a weaker prediction: weak + scale (output - weak).

    The weaker prediction is the guide's at the same x, t and y (autoguidance, Karras et al., 2024) or, without a guide,
    the model's own with every label `null_label` (classifier-free guidance, Ho and Salimans, 2022). It is computed only
    where it counts: at scales other than 1 and times in the closed interval (Kynkaanniemi et al., 2024), which is in
    shifted time, 0 being data. `time` is a scalar tensor; on the CPU, deciding waits for nothing. The result has the
    dtype of `x`, whatever precision the model computes in. Velocity, noise, score and data follow from each other by
    formulas that are affine in the output, so guiding one is guiding all.
    """
    t = time.to(x).expand(x.shape[0])
    output = model(x, t, y).to(x.dtype)
    low, high = interval
    if scale == 1.0 or not bool((time >= low) & (time <= high)):
        return output
    weak = guide(x, t, y) if guide is not None else model(x, t, torch.full_like(y, null_label))
    return weak + scale * (output - weak)


def refuse_impossible_guidance(model: Model, scale: float, interval: tuple[float, float], guide: Model | None) -> None:
    """Raise `ConfigError` for an empty interval, a guide without effect, and classifier-free guidance of a model that
    always had labels."""
    if interval[0] >= interval[1]:
        raise ConfigError(f"`guidance_interval` {list(interval)} is empty; it is [least time, greatest time]")
    if scale == 1.0 and guide is not None:
        raise ConfigError("A guide has no effect at `guidance_scale` 1; set another, or give no guide")
    config = getattr(model, "config", None)
    if scale == 1.0 or guide is not None or config is None:
        return
    if config.num_classes == 0 and not config.conditioning_dim:
        raise ConfigError("An unconditional model has no labels to guide by; set `guidance_scale` to 1 or give a guide")
    if not config.has_null_label or config.class_dropout_prob == 0:
        raise ConfigError(
            "This model was trained with `class_dropout_prob` 0 and has no prediction without a label; set"
            " `guidance_scale` to 1 or give a guide"
        )
