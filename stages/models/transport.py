"""Transport between data and noise: paths, predictions, losses and times (SiT, Ma et al., 2024).

x_t = alpha(t) x1 + sigma(t) noise, with x1 the data at t = 0 and noise at t = 1. A model predicts one of four things of
x_t, which determine each other:

    velocity  alpha' x1 + sigma' noise, the drift of the probability-flow ODE
    noise     the noise
    score     -noise / sigma, in expectation the gradient of log p_t
    data      x1

All conversions below follow from the definitions by solving two linear equations, whose determinant is
alpha sigma' - alpha' sigma. For the VP path they differ from the official release, which takes the drift and the
diffusion of another process there (its noise and score ODEs do not sample the data); likelihood weights are positive
here and negative there. Everything else equals it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch.special import ndtri

from rae.store.errors import ConfigError

PathType = Literal["Linear", "GVP", "VP"]
Prediction = Literal["velocity", "noise", "score", "data"]
LossWeight = Literal["velocity", "likelihood"]
TimeDistribution = Literal["uniform", "logit-normal"]
Model = Callable[[Tensor, Tensor, Tensor], Tensor]

# Distance kept from an end of the path where a formula divides by zero; times are drawn from [.., 1 - MARGIN] always.
MARGIN = 1e-3
# The VP path's noise schedule (Song et al., 2021, appendix C), run from noise to data.
VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0
# Numbers in the latent for which the RAE paper takes the schedule unshifted (section 4.2; after Esser et al., 2024).
SHIFT_BASE = 4096


class Coefficients(NamedTuple):
    """A path at the times t: x_t = alpha x1 + sigma noise, and the derivatives with respect to t."""

    alpha: Tensor
    d_alpha: Tensor
    sigma: Tensor
    d_sigma: Tensor

    @property
    def determinant(self) -> Tensor:
        """alpha sigma' - alpha' sigma, positive inside (0, 1)."""
        return self.alpha * self.d_sigma - self.d_alpha * self.sigma


def linear_path(t: Tensor) -> Coefficients:
    """Straight lines: alpha = 1 - t, sigma = t."""
    return Coefficients(1 - t, -torch.ones_like(t), t, torch.ones_like(t))


def gvp_path(t: Tensor) -> Coefficients:
    """Generalised variance-preserving: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""
    cosine, sine = torch.cos(t * pi / 2), torch.sin(t * pi / 2)
    return Coefficients(cosine, -pi / 2 * sine, sine, pi / 2 * cosine)


def vp_path(t: Tensor) -> Coefficients:
    """Variance-preserving with linear beta: log sigma = -(beta_max - beta_min) (1 - t)^2 / 4 - beta_min (1 - t) / 2.

    alpha = sqrt(1 - sigma^2), so alpha' is infinite at t = 1.
    """
    log_sigma = -0.25 * (1 - t) ** 2 * (VP_BETA_MAX - VP_BETA_MIN) - 0.5 * (1 - t) * VP_BETA_MIN
    half_beta = 0.5 * (1 - t) * (VP_BETA_MAX - VP_BETA_MIN) + 0.5 * VP_BETA_MIN
    sigma, alpha = torch.exp(log_sigma), torch.sqrt(-torch.expm1(2 * log_sigma))
    return Coefficients(alpha, -(sigma**2) * half_beta / alpha, sigma, sigma * half_beta)


PATHS: dict[str, Callable[[Tensor], Coefficients]] = {"Linear": linear_path, "GVP": gvp_path, "VP": vp_path}


@dataclass(frozen=True)
class Transport:
    """A path, what the model predicts of it, how errors are weighted and at which times; see `create_transport`.

    x1, noise, x_t and the model's output have shape [B, ...], times [B].
    """

    path_type: PathType
    prediction: Prediction
    loss_weight: LossWeight | None
    time_dist_type: TimeDistribution
    time_dist_shift: float

    def __post_init__(self) -> None:
        ends = torch.tensor(self.training_interval, dtype=torch.float64)
        if not bool(torch.isfinite(self.weight(ends)).all()):
            raise ConfigError(
                f"`loss_weight` {self.loss_weight} is infinite at t = 0 for {self.prediction} prediction on the"
                f" {self.path_type} path: take `loss_weight: velocity`, `prediction: noise`, or `path_type: VP`"
            )

    def coefficients(self, t: Tensor, like: Tensor | None = None) -> Coefficients:
        """The path at times [B], shaped to broadcast against `like` [B, ...] where given."""
        return PATHS[self.path_type](t if like is None else t.reshape(-1, *[1] * (like.dim() - 1)))

    # Times

    @property
    def training_interval(self) -> tuple[float, float]:
        """Unshifted times that training draws from: off t = 0 where the target or the drift divides by sigma(0) = 0."""
        divides = self.prediction != "velocity" and self.path_type != "VP"
        return (MARGIN if divides else 0.0), 1 - MARGIN

    def sample_times(self, u: Tensor, normal: Tensor | None = None) -> Tensor:
        """Training times from given draws of any shape, shifted.

        `uniform` takes `u`, uniform in [0, 1). `logit-normal` is logistic(`normal`), standard normal draws that are
        made from `u` if not given.
        """
        low, high = self.training_interval
        if self.time_dist_type == "uniform":
            t = low + (high - low) * u
        else:
            # The interval's ends are 6.9 standard deviations out, so clamping is truncation.
            t = torch.sigmoid(ndtri(u) if normal is None else normal).clamp(low, high)
        return shift_time(t, self.time_dist_shift)

    def sampling_times(self, num_steps: int, end: float | None = None) -> Tensor:
        """The sampler's grid, from noise towards data, float32 [num_steps]: num_steps points are num_steps - 1 steps.

        It ends at the shifted time `end`, by default a margin before t = 0, and begins one after t = 1 where the drift
        is infinite there (VP) or follows from dividing by alpha(1) = 0 (noise and score).
        """
        divides = self.prediction in ("noise", "score") or self.path_type == "VP"
        last = MARGIN if end is None else shift_time(torch.tensor(end), 1 / self.time_dist_shift).item()
        grid = 1 - torch.linspace(MARGIN if divides else 0.0, 1 - last, num_steps)
        return shift_time(grid, self.time_dist_shift)

    # Losses

    def path(self, x1: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and its velocity u_t, the shape of `x1`."""
        at = self.coefficients(t, x1)
        return at.alpha * x1 + at.sigma * noise, at.d_alpha * x1 + at.d_sigma * noise

    def weight(self, t: Tensor) -> Tensor:
        """The factor of the squared error at times of any shape.

        Without `loss_weight` it is 1, the error being that of the prediction itself (of sigma times the score). The
        weight `velocity` makes of it the error of the implied velocity; `likelihood` bounds the likelihood:
        g(t)^2 / 2 times the squared error of the implied score (Song et al., 2021, theorem 1), with
        g^2 / 2 = sigma (alpha sigma' - alpha' sigma) / alpha.
        """
        if self.loss_weight is None:
            return torch.ones_like(t)
        at = self.coefficients(t)
        match self.prediction:
            case "velocity":
                velocity = torch.ones_like(t)
            case "data":
                velocity = (at.determinant / at.sigma) ** 2
            case "noise" | "score":
                velocity = (at.determinant / at.alpha) ** 2
        return velocity if self.loss_weight == "velocity" else velocity * at.alpha / (at.sigma * at.determinant)

    def training_losses(
        self,
        model: Model,
        x1: Tensor,
        y: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Weighted mean squared error of each sample, float32 [B].

        Args:
            model: `model(x_t, t, y)`, of the shape of `x1`.
            x1: latents [B, C, H, W].
            y: labels [B].
            t: times [B], shifted already (`sample_times`); drawn if not given.
            noise: standard normal, the shape of `x1`; drawn if not given.
            generator: where draws come from, on its own device; torch's global one if not given.
        """
        device = x1.device if generator is None else generator.device
        if t is None:
            t = self.sample_times(torch.rand(x1.shape[0], generator=generator, device=device)).to(x1.device)
        if noise is None:
            noise = torch.randn(x1.shape, generator=generator, device=device).to(x1)
        x_t, velocity = self.path(x1, noise, t)
        output = model(x_t, t, y).float()
        if self.prediction == "score":
            error = output * self.coefficients(t, x1).sigma + noise
        else:
            error = output - {"velocity": velocity, "noise": noise, "data": x1}[self.prediction]
        return self.weight(t) * error.square().flatten(1).mean(dim=1)

    # What a prediction means

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The ODE's drift dx/dt at x_t = `x`, from the model's output there."""
        at = self.coefficients(t, x)
        match self.prediction:
            case "velocity":
                return output
            case "data":
                return (at.d_sigma * x - at.determinant * output) / at.sigma
            case "noise":
                return (at.d_alpha * x + at.determinant * output) / at.alpha
            case "score":
                return (at.d_alpha * x - at.determinant * at.sigma * output) / at.alpha

    def score(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The gradient of log p_t at x_t = `x`, from the model's output there; t > 0."""
        at = self.coefficients(t, x)
        match self.prediction:
            case "velocity":
                return (at.d_alpha * x - at.alpha * output) / (at.sigma * at.determinant)
            case "data":
                return (at.alpha * output - x) / at.sigma**2
            case "noise":
                return -output / at.sigma
            case "score":
                return output


def create_transport(
    path_type: str = "Linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    time_dist_type: str = "uniform",
    time_dist_shift: float = 1.0,
) -> Transport:
    """A transport by the names that configurations use.

    Args:
        path_type: `Linear`, `GVP` or `VP`.
        prediction: `velocity`, `noise`, `score` or `data`.
        loss_weight: None, `velocity` or `likelihood`; see `Transport.weight`.
        time_dist_type: `uniform` or `logit-normal` (of mean 0 and variance 1; `logit-normal_0_1` is the same).
        time_dist_shift: above 1 moves training and sampling times towards noise; see `auto_shift`.

    Raises:
        ConfigError: an unknown name, a shift that is not positive, or a weight that is infinite in training.
    """
    if time_dist_type == "logit-normal_0_1":
        time_dist_type = "logit-normal"
    named("path_type", path_type, get_args(PathType))
    named("prediction", prediction, get_args(Prediction))
    if loss_weight is not None:
        named("loss_weight", loss_weight, get_args(LossWeight))
    named("time_dist_type", time_dist_type, get_args(TimeDistribution))
    if not 0 < time_dist_shift < float("inf"):
        raise ConfigError(f"`time_dist_shift` is {time_dist_shift}; it must be a positive number")
    return Transport(
        cast(PathType, path_type),
        cast(Prediction, prediction),
        cast(LossWeight | None, loss_weight),
        cast(TimeDistribution, time_dist_type),
        float(time_dist_shift),
    )


def named(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is among the choices."""
    if value not in choices:
        raise ConfigError(f"`{key}` is {value!r}; it must be one of {', '.join(choices)}")


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t -> shift t / (1 + (shift - 1) t): [0, 1] onto itself, towards 1 where shift > 1 (RAE paper, section 4.2)."""
    return shift * t / (1 + (shift - 1) * t)


def auto_shift(channels: int, height: int, width: int) -> float:
    """The shift for latents of this size: sqrt(C H W / 4096), at least 1; 6.93 for 768 x 16 x 16."""
    return max(1.0, sqrt(channels * height * width / SHIFT_BASE))
