"""The stochastic sampler: Euler-Maruyama of the reverse SDE (SiT, Ma et al., 2024, section 2.4).

dx = (v - w/2 score) dt + sqrt(w) dW, run from noise at t = 1 towards data at t = 0, has the marginals of the
probability-flow ODE dx = v dt for every w(t) >= 0. Forms of w are named as in the field and sized as in its code:
`diffusion_norm` 1 means w/2 = the form. Where the official release differs: SBDM is the diffusion of the path's own
forward process (there it is negative on Linear and GVP, and another process's on VP), and the last step begins where
the others end (there at the unshifted time).
"""

from collections.abc import Callable
from itertools import pairwise
from math import inf, sqrt
from typing import Literal, get_args

import torch
from torch import Tensor

from rae.stages.models.samplers import Progress, guided, refuse_impossible_guidance
from rae.stages.models.transport import Model, Transport, named
from rae.store.errors import ConfigError

DiffusionForm = Literal["SBDM", "constant", "sigma", "linear", "decreasing", "increasing-decreasing"]
LastStep = Literal["Mean", "Tweedie", "Euler"]


@torch.no_grad()
def sample_sde(
    model: Model,
    noise: Tensor,
    y: Tensor,
    *,
    transport: Transport,
    step_noise: Callable[[int], Tensor],
    num_steps: int = 50,
    diffusion_form: str = "sigma",
    diffusion_norm: float = 1.0,
    last_step: str | None = "Euler",
    last_step_size: float = 0.04,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    null_label: float,
    guide: Model | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Latents from noise: [B, C, H, W] -> the same shape, dtype and device.

    A step's diffusion is that of its end, so that SBDM is finite from the first step on; w may be any function of time.

    Args:
        model, noise, y, transport: as for `sample_ode`.
        step_noise: the standard normal noise of step 1, 2, ..., of the shape of `noise`; asked once for each step, in
            order, but not for a last step without noise.
        num_steps: points of the time grid, one more than there are steps, the last step included; at least 3.
        diffusion_form: see `half_diffusion`; `sigma` and those that vanish at t = 0 leave the least noise.
        diffusion_norm: factor of the form, above 0.
        last_step: the step without noise from t = `last_step_size` to 0. `Euler` is the ODE's; `Tweedie` the expected
            data, (x + sigma^2 score) / alpha; `Mean` the SDE's without its noise, whose variance w times the step is
            then missing. None: all steps are noisy and end a margin before 0, as the ODE's do.
        last_step_size: in shifted time, in (0, 1).
        guidance_scale, guidance_interval, null_label, guide: see `guided`; velocity and score follow from the guided
            output.
        progress: told (steps done, steps to do) after each step.

    Raises:
        ConfigError: an unknown name, a size or norm out of range, an empty grid or interval, or guidance that this
            model cannot give.
    """
    named("diffusion_form", diffusion_form, get_args(DiffusionForm))
    if not 0 < diffusion_norm < inf:
        raise ConfigError(f"`diffusion_norm` is {diffusion_norm}; it must be positive, for w to be a variance")
    refuse_impossible_guidance(model, guidance_scale, guidance_interval, guide)
    times = sde_times(transport, num_steps, last_step, last_step_size)
    x = noise
    for step, (time, following) in enumerate(pairwise(times), start=1):
        size = (following - time).item()
        t = time.to(x).expand(x.shape[0])
        output = guided(model, x, time, y, guidance_scale, guidance_interval, null_label, guide)
        velocity, score = transport.velocity(output, x, t), transport.score(output, x, t)
        ending = last_step if following == 0 else None
        if ending == "Euler":
            x = x + size * velocity
        elif ending == "Tweedie":
            at = transport.coefficients(t, x)
            x = (x + at.sigma**2 * score) / at.alpha
        else:
            half = half_diffusion(transport, diffusion_form, diffusion_norm, time if ending == "Mean" else following)
            x = x + size * (velocity - half * score)
            if ending is None:
                x = x + sqrt(2 * half * -size) * step_noise(step)
        if progress is not None:
            progress(step, num_steps - 1)
    return x


def sde_times(transport: Transport, num_steps: int, last_step: str | None, last_step_size: float) -> Tensor:
    """The grid [num_steps] from noise towards data; with a last step it ends in `last_step_size`, 0."""
    if num_steps < 3:
        raise ConfigError(f"`num_steps` is {num_steps}; the grid of an SDE needs 3 points or more")
    if last_step is None:
        return transport.sampling_times(num_steps)
    named("last_step", last_step, get_args(LastStep))
    start = transport.sampling_times(2)[0].item()
    if not 0 < last_step_size < start:
        raise ConfigError(
            f"`last_step_size` is {last_step_size}; it must lie between 0 and the first time, {start:.4f}"
        )
    return torch.cat([transport.sampling_times(num_steps - 1, end=last_step_size), torch.zeros(1)])


def half_diffusion(transport: Transport, form: str, norm: float, time: Tensor) -> float:
    """w(t) / 2 at a scalar time below 1; at least 0 for a positive norm, and finite.

    `SBDM` is sigma (alpha sigma' - alpha' sigma) / alpha, of the forward process from data to noise that has this
    path's marginals (Song et al., 2021). The others are SiT's, in our direction of time: `constant` 1; `sigma`;
    `linear` t; `decreasing` towards data ((1 - norm cos(pi t)) / 2)^2; `increasing-decreasing` sin(pi t)^2.
    """
    t = time.double()
    at = transport.coefficients(t)
    match form:
        case "SBDM":
            value = norm * at.sigma * at.determinant / at.alpha
        case "constant":
            value = norm * torch.ones_like(t)
        case "sigma":
            value = norm * at.sigma
        case "linear":
            value = norm * t
        case "decreasing":
            value = ((1 - norm * torch.cos(torch.pi * t)) / 2) ** 2
        case "increasing-decreasing":
            value = norm * torch.sin(torch.pi * t) ** 2
        case _:
            raise AssertionError(form)
    return value.item()
